"""Holds the planner to its predictions, and its policies to a grid of others, on this machine.

    python -m bench.planner [--quick] [--profile FILE] [--cases 24] [--grid 3] [--alternatives 30]

Seeded models of three types, of which weights outgrow what a budget leaves for them by 0.5 to 4, run
uniform and ragged jobs with the policy that was planned for them. Every run is a line of a JSON file.
"""

import argparse
import dataclasses
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import transformers

from bench.peers import DEFAULT_CACHE, absolute
from bench.planner_cases import (
    Case,
    Scale,
    cases,
    host_budget_bytes,
    prompts_of,
    requests_of,
    spread_out,
    write_model,
)
from bench.planner_figures import Ran, best_alternatives, grid_table, table
from bench.planner_grid import alternatives, in_turns, interleaved
from bench.workloads import Request, Sizes, workload_of
from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.foresight import Foresight, foresee
from engine.planning.cost import with_spare_kv
from engine.planning.hardware import Hardware
from engine.planning.plan import make_plan
from engine.planning.planners.base import Situation, Wishes
from engine.planning.policy import Policy
from engine.planning.predict import predict
from engine.planning.roofline import Model
from engine.planning.workload import Workload
from engine.profiling.saved import measured_or_saved, read_hardware
from engine.sweep.outcome import outcome_of

_GIB = 2**30
_TIMES_PLANNED = 3
_FINALISTS = 3
_FINALS = 6
_WARM_UP = Prompt(key="warm-up", token_ids=(2,), sampling=Sampling(max_tokens=2, ignore_eos=True))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One case, ready to be run under any policy."""

    case: Case
    model: Path
    foresight: Foresight
    requests: tuple[Request, ...]
    workload: Workload
    hardware: Hardware
    budgets: Budgets

    def planned(self) -> Policy:
        """As the worker would have it: what is left over goes to keys and values."""
        situation = Situation(
            hardware=self.hardware, work=self.foresight.work, workload=self.workload
        )
        plan = make_plan(self.foresight.shape, self.budgets, Wishes(situation=situation))
        return with_spare_kv(self.foresight.shape, plan.policy, self.budgets)

    def run(self, policy: Policy, *, is_planned: bool) -> Ran:
        """The whole job. Raises RuntimeError if it generates other than was asked for."""
        model = Model(shape=self.foresight.shape, work=self.foresight.work, hardware=self.hardware)
        prediction = predict(model, policy, self.workload)
        with Engine.load(self.model, budgets=self.budgets, policy=policy) as engine:
            list(engine.generate([_WARM_UP]))
            before = engine.report()
            started_s = time.perf_counter()
            generated = sum(
                done.num_generated for done in engine.generate(prompts_of(self.requests))
            )
            job_s = time.perf_counter() - started_s
            report = engine.report().since(before)
        asked = sum(request.max_tokens for request in self.requests)
        if generated != asked:
            raise RuntimeError(f"{self.case.name}: {generated} tokens generated, {asked} asked for")
        outcome = outcome_of(prediction, policy, report)
        assert outcome is not None, "a job has sweeps"
        rate = generated / job_s
        told = f"{rate:.0f} tok/s, {prediction.job_tokens_per_s:.0f} predicted, {job_s:.1f} s"
        print(f"  {self.case.name}: {told}; {policy.reason}", file=sys.stderr, flush=True)
        return Ran(
            case=self.case,
            policy=policy,
            host_bytes=self.budgets.host_bytes,
            is_planned=is_planned,
            job_s=job_s,
            predicted_tokens_per_s=prediction.job_tokens_per_s,
            measured_tokens_per_s=rate,
            preempted_rows=report.preempted_rows,
            outcome=outcome,
        )


def prepare(case: Case, *, cache: Path, scale: Scale, hardware: Hardware) -> Setting:
    model = write_model(cache, case, scale, seed=scale.sizes.seed)
    foresight = foresee(model, on_gpu=False)
    requests = requests_of(case, scale.sizes)
    workload = workload_of(requests)
    budgets = Budgets(
        gpu_bytes=0,
        host_bytes=host_budget_bytes(foresight.shape, workload, case.ratio),
        disk_bytes=8 * _GIB,
        spill_dir=cache / "spill",
    )
    return Setting(
        case=case,
        model=model,
        foresight=foresight,
        requests=requests,
        workload=workload,
        hardware=hardware,
        budgets=budgets,
    )


def run_grid(setting: Setting, *, count: int, seed: int) -> list[Ran]:
    """Alternatives in random order with the planned policy between them; then the fastest again, in
    turns with it.
    """
    planned = setting.planned()
    others = alternatives(
        setting.foresight.shape, setting.budgets, setting.workload, planned, count=count, seed=seed
    )
    random.Random(seed).shuffle(others)
    runs = [
        setting.run(policy, is_planned=policy is planned)
        for policy in interleaved(others, planned, times=_TIMES_PLANNED)
    ]
    finalists = [each[0].policy for each in best_alternatives(runs)[:_FINALISTS]]
    for each in in_turns([*finalists, planned], times=_FINALS):
        final = setting.run(each, is_planned=each is planned)
        runs.append(dataclasses.replace(final, is_final=True))
    return runs


def scale_of(*, is_quick: bool, seed: int) -> Scale:
    rows, output_tokens = (16, 8) if is_quick else (96, 24)
    sizes = Sizes(
        rows=rows,
        prompt_tokens=32,
        output_tokens=output_tokens,
        prefix_prompt_tokens=32,
        prefix_share=0.0,
        seed=seed,
    )
    return Scale(layers=6, hidden=256 if is_quick else 1024, sizes=sizes)


def main(words: Sequence[str] | None = None) -> int:
    arguments = _arguments(words)
    transformers.utils.logging.disable_progress_bar()
    cache: Path = arguments.cache / "planner"
    cache.mkdir(parents=True, exist_ok=True)
    scale = scale_of(is_quick=arguments.quick, seed=arguments.seed)
    rounds: list[list[Ran]] = []
    settings: list[Setting] = []
    # Repetitions are rounds over all cases: a slow spell of the machine meets them alike. Each is
    # predicted by a profile of just before: hours later a shared machine is another one.
    for _ in range(arguments.repetitions):
        hardware = _profile(arguments, cache)
        settings = [
            prepare(case, cache=cache, scale=scale, hardware=hardware)
            for case in spread_out(cases(), arguments.cases)
        ]
        rounds.append([setting.run(setting.planned(), is_planned=True) for setting in settings])
    print(table(list(zip(*rounds, strict=True))))
    of_cases = {setting.case: setting for setting in settings}
    grids = [
        run_grid(of_cases[case], count=arguments.alternatives, seed=arguments.seed)
        for case in spread_out(list(of_cases), arguments.grid)
    ]
    if grids:
        print(f"\n{grid_table(grids)}")
    runs_file: Path = arguments.json or cache / "runs.jsonl"
    with runs_file.open("w") as file:
        for run in itertools.chain(*rounds, *grids):
            file.write(json.dumps(run.as_dict()) + "\n")
    print(f"every run is in {runs_file}", file=sys.stderr)
    return 0


def _profile(arguments: argparse.Namespace, cache: Path) -> Hardware:
    if arguments.profile is not None:
        return read_hardware(arguments.profile)
    return measured_or_saved(
        cache / "profile.json", spill_dir=cache, is_quick=arguments.quick, force=True
    )


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=absolute, default=DEFAULT_CACHE)
    parser.add_argument("--profile", type=Path, help="this machine's; else measured for each round")
    parser.add_argument("--json", type=Path, help="for the runs; else a file in the cache")
    parser.add_argument("--quick", action="store_true", help="smaller models, jobs and profile")
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--grid", type=int, default=3, help="cases that others are tried on")
    parser.add_argument("--alternatives", type=int, default=30, help="of each of those")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
