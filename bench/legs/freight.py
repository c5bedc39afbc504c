"""The leg that is Freight. All that the benchmarks know of the engine's interface is here."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.legs.job import Job, Result, emit, read_bytes, this_job, total_tokens
from bench.policies import planned, situation_of
from bench.workloads import Request
from engine.config import Budgets, Completion, Prompt, Sampling
from engine.engine import Engine
from engine.memory.measure import measure_budgets
from engine.planning.planners.base import Situation, Wishes
from engine.planning.policy import Policy
from engine.planning.shape import ModelShape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What one sweep computed. `decoded_tokens` went through the layers, `sampled_rows` the head."""

    prompt_tokens: int
    decoded_tokens: int
    sampled_rows: int
    seconds: float


def load(job: Job) -> Engine:
    """`host_bytes` of the options, or what is left of `limit_bytes` beside this interpreter."""
    options = job.options
    host_bytes = options.get("host_bytes") or (
        options["limit_bytes"] - resident_bytes() - options["headroom_bytes"]
    )
    budgets = measure_budgets(
        spill_dir=Path(options["spill_dir"]), gpu_bytes=0, host_bytes=host_bytes
    )
    wishes = Wishes(
        block_rows=options.get("block_rows"),
        sweep_tokens=options.get("sweep_tokens"),
        situation=_situation(job),
    )

    def plan(shape: ModelShape, have: Budgets) -> Policy:
        return planned(shape, have, wishes, job.requests)

    return Engine.load(
        Path(options["checkpoint"]),
        budgets=budgets,
        policy=plan,
        compute_dtype=options["dtype"],
    )


def _situation(job: Job) -> Situation | None:
    """Where a profile is given."""
    options = job.options
    if options.get("profile") is None:
        return None
    return situation_of(
        Path(options["checkpoint"]),
        job.requests,
        Path(options["profile"]),
        on_gpu=False,
        compute_dtype=options["dtype"],
    )


def resident_bytes() -> int:
    """Of this process before it holds any weight: the interpreter, torch and their code."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def sweeps(
    engine: Engine, requests: tuple[Request, ...], *, ignore_eos: bool
) -> Iterator[tuple[Sweep, list[Completion]]]:
    """Sweep until all are answered, with the block as full as it gets, as `generate` does."""
    waiting = iter(requests)
    drained = False
    decoding = 0
    while not drained or engine.num_rows:
        while not drained and engine.num_rows < 2 * engine.block_rows:
            request = next(waiting, None)
            if request is None:
                drained = True
            else:
                engine.submit(_prompt(request, ignore_eos=ignore_eos))
        before = engine.report()
        started_s = time.perf_counter()
        completions = engine.sweep()
        seconds = time.perf_counter() - started_s
        after = engine.report()
        sampled = after.generated_tokens - before.generated_tokens
        yield (
            Sweep(
                prompt_tokens=after.prompt_tokens - before.prompt_tokens,
                decoded_tokens=decoding,
                sampled_rows=sampled,
                seconds=seconds,
            ),
            completions,
        )
        decoding = sampled - len(completions)


def _prompt(request: Request, *, ignore_eos: bool) -> Prompt:
    sampling = Sampling(max_tokens=request.max_tokens, ignore_eos=ignore_eos)
    return Prompt(key=request.key, token_ids=request.token_ids, sampling=sampling)


def answer(engine: Engine, job: Job, *, load_s: float) -> Result:
    done: list[Sweep] = []
    answers: dict[str, list[int]] = {}
    before = engine.report()
    started_read_bytes = read_bytes()
    started_s = time.perf_counter()
    for sweep, completions in sweeps(engine, job.requests, ignore_eos=job.ignore_eos):
        done.append(sweep)
        answers |= {completion.key: list(completion.token_ids) for completion in completions}
    seconds = time.perf_counter() - started_s
    after = engine.report()
    streamed = after.weights_streamed_bytes - before.weights_streamed_bytes
    return Result(
        seconds=seconds,
        load_s=load_s,
        output_tokens=sum(map(len, answers.values())),
        total_tokens=total_tokens(job.requests, answers),
        read_bytes=read_bytes() - started_read_bytes,
        detail={
            "sweeps": [dataclasses.asdict(sweep) for sweep in done],
            "streamed_bytes": streamed,
            "block_rows": engine.block_rows,
            "report": _report(engine),
        },
        answers=answers,
    )


def _report(engine: Engine) -> dict[str, Any]:
    return engine.report().as_dict()


def main() -> int:
    job = this_job()
    started_s = time.perf_counter()
    with load(job) as engine:
        first = dataclasses.replace(job.requests[0], key="warm-up", max_tokens=1)
        for _ in sweeps(engine, (first,), ignore_eos=True):
            continue
        load_s = time.perf_counter() - started_s
        if job.options.get("only_load"):
            emit(Result(seconds=0, load_s=load_s, output_tokens=0, total_tokens=0, read_bytes=0))
            return 0
        for _ in range(job.options.get("passes", 1)):
            emit(answer(engine, job, load_s=load_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
