"""A model larger than its memory: Freight beside Accelerate, AirLLM and llama.cpp, alternating.

    make bench-peers
    python -m bench.offload [--ratios 2 --workloads uniform --peers llama-bf16 ... --quick]

Every leg is a process of its own under one memory cgroup limit, page cache included and without
swap, on the same cores, over the same bytes of weights. The ratio is weight bytes over the limit.
End of sequence is off, so every engine makes exactly the tokens asked for. A peer's batch size is
searched in the first repetition of each ratio's first workload. Exits with 1 if Freight's answers
change between repetitions or a request got another number of tokens than it asked for.
"""

import argparse
import json
import sys
from pathlib import Path

from bench.contenders import DTYPES, FREIGHT, PEERS, Contenders
from bench.figures import Ceilings, Row, table
from bench.legs.job import Job
from bench.llama_shape import LlamaShape, add_shape_arguments
from bench.machine import machine_profile
from bench.memory_group import MemoryGroup, NoMemoryGroupError
from bench.peers import DEFAULT_CACHE, absolute
from bench.runner import Bench, Ending, Outcome, usable_cpus
from bench.workloads import WORKLOADS, Sizes, Workload

_GAIN = 1.05
"""A larger batch must be so much faster to be worth trying a still larger one."""


class Search:
    """Finds each peer's batch size, and gives it up for a smaller one where memory falls short."""

    def __init__(self, bench: Bench, contenders: Contenders, batches: list[int]) -> None:
        self._bench = bench
        self._contenders = contenders
        self._batches = sorted(batches)
        self._best: dict[str, int] = {}

    def run(self, peer: str, workload: Workload) -> list[Outcome]:
        """All outcomes of the search the first time; afterwards that of the best size."""
        if peer not in self._best:
            return self._find(peer, workload)
        outcomes = [self._try(peer, self._best[peer], workload)]
        while outcomes[-1].ending is Ending.OUT_OF_MEMORY and self._best[peer] > 1:
            self._best[peer] //= 2
            outcomes.append(self._try(peer, self._best[peer], workload))
        return outcomes

    def _find(self, peer: str, workload: Workload) -> list[Outcome]:
        outcomes: list[Outcome] = []
        best_rate = 0.0
        for batch in self._batches:
            if batch > len(workload.requests):
                break
            outcomes.append(self._try(peer, batch, workload))
            rate = outcomes[-1].output_tokens_per_s or 0.0
            if outcomes[-1].ending in {Ending.OUT_OF_MEMORY, Ending.FAILED}:
                break
            previous, best_rate = best_rate, max(best_rate, rate)
            if rate == best_rate:
                self._best[peer] = batch
            if rate < _GAIN * previous or outcomes[-1].ending is Ending.CUT_SHORT:
                break
        return outcomes

    def _try(self, peer: str, batch: int, workload: Workload) -> Outcome:
        return self._bench.run(*self._contenders.peer(peer, batch, workload))


def run_ratio(ratio: float, limit_bytes: int, arguments: argparse.Namespace) -> list[Row]:
    """All repetitions under one limit: in each, every workload, in each of those every engine."""
    contenders = make_contenders(arguments)
    bench = Bench(cpus=arguments.cpus, deadline_s=arguments.leg_limit, limit_bytes=limit_bytes)
    search = Search(bench, contenders, arguments.peer_batches)
    rows: list[Row] = []
    for repetition in range(arguments.repetitions):
        ceilings = measure_ceilings(bench, contenders)
        for workload in make_workloads(arguments):
            print(f"ratio {ratio:g}, {workload.name}, {repetition + 1}:", file=sys.stderr)
            outcomes = [
                bench.run(*contenders.freight(workload, limit_bytes, kind=kind))
                for kind in arguments.freight_dtypes
            ]
            for peer in arguments.peers:
                outcomes += search.run(peer, workload)
            measured = [
                Row(
                    ratio=ratio,
                    workload=workload.name,
                    repetition=repetition,
                    ceilings=ceilings,
                    outcome=outcome,
                )
                for outcome in outcomes
            ]
            append_rows(arguments.json, measured)
            rows += measured
    return rows


def measure_ceilings(bench: Bench, contenders: Contenders) -> Ceilings:
    packs = contenders.packs()
    newest = max(packs, key=lambda path: path.stat().st_mtime_ns, default=contenders.weights_file)
    options = {"checkpoint": str(contenders.checkpoint), "weights_file": str(newest)}
    job = Job(requests=(), threads=len(bench.cpus), ignore_eos=True, options={})
    ceilings = Ceilings.of(bench.measure(job, options))
    rates = [f"{rate / 1e9:.0f} in {name}" for name, rate in ceilings.flops_per_s.items()]
    print(
        f"disk {ceilings.disk_bytes_per_s / 1e9:.2f} GB/s, products in GFLOP/s: {', '.join(rates)}",
        file=sys.stderr,
    )
    return ceilings


def make_contenders(arguments: argparse.Namespace) -> Contenders:
    return Contenders(
        folder=arguments.cache,
        shape=LlamaShape.from_arguments(arguments),
        threads=len(arguments.cpus),
        headroom_bytes=arguments.headroom_mib * 2**20,
        block_rows=arguments.block_rows,
        sweep_tokens=arguments.sweep_tokens,
        profile=machine_profile(arguments.cache) if arguments.planner == "milp" else None,
    )


def make_workloads(arguments: argparse.Namespace) -> list[Workload]:
    sizes = Sizes.from_arguments(arguments)
    return [WORKLOADS[name](sizes, arguments.vocab) for name in arguments.workloads]


def append_rows(path: Path | None, rows: list[Row]) -> None:
    """After every workload, so that a run that is stopped leaves what it has measured."""
    if path is not None:
        with path.open("a") as file:
            file.writelines(f"{json.dumps(row.as_dict(), default=str)}\n" for row in rows)


def print_tables(rows: list[Row], limit_bytes: int) -> None:
    for workload in dict.fromkeys(row.workload for row in rows):
        chosen = [row for row in rows if row.workload == workload]
        print(f"\n{workload}, ratio {chosen[0].ratio:g}: {limit_bytes:,} bytes of memory\n")
        print(table(chosen))
        ours = [row.outcome for row in chosen if row.outcome.leg.engine == FREIGHT]
        for name, last in {outcome.leg.name: outcome for outcome in ours}.items():
            if last.result is not None:
                print(f"\nThe report of {name}: {json.dumps(last.result.detail['report'])}")
            else:
                print(f"\n{name}: {last.ending}: {last.last_words}")


def check(rows: list[Row], workloads: list[Workload]) -> int:
    """1 if one of Freight's passes differs from another or from what was asked for."""
    wrong = 0
    for workload in workloads:
        asked = {request.key: request.max_tokens for request in workload.requests}
        chosen = [row.outcome for row in rows if row.workload == workload.name]
        ours = [outcome for outcome in chosen if outcome.leg.engine == FREIGHT]
        for name in dict.fromkeys(outcome.leg.name for outcome in ours):
            named = [outcome for outcome in ours if outcome.leg.name == name]
            passes = [result.answers for outcome in named for result in outcome.results]
            lengths = [{key: len(tokens) for key, tokens in each.items()} for each in passes]
            wrong += sum(each != asked for each in lengths)
            wrong += sum(each != passes[0] for each in passes)
        _compare(chosen, workload.name)
    return 1 if wrong else 0


def _compare(outcomes: list[Outcome], workload: str) -> None:
    """Padding and half precision change rounding: differences of others are told, no fault."""
    seen = {each.leg.name: each.result.answers for each in outcomes if each.result is not None}
    first = next((name for name in seen if name.startswith(FREIGHT)), None)
    for name, answers in seen.items():
        if answers and first is not None and name != first:
            same = sum(seen[first][key] == tokens for key, tokens in answers.items())
            print(f"{workload}: {same} of {len(answers)} answers of {name} equal {first}'s.")


def main() -> int:
    arguments = parse_arguments()
    contenders = make_contenders(arguments)
    weight_bytes = contenders.write_models(arguments.peers)
    limits = {ratio: int(weight_bytes / ratio) for ratio in arguments.ratios}
    try:
        MemoryGroup.make("freight-bench-try", limit_bytes=min(limits.values())).close()
    except NoMemoryGroupError as error:
        print(error, file=sys.stderr)
        return 2
    if not contenders.packs():
        unlimited = Bench(cpus=arguments.cpus, deadline_s=1_800)
        unlimited.run(*contenders.freight_once(make_workloads(arguments)[0]))
    print(f"{weight_bytes:,} bytes of weights, {len(arguments.cpus)} cores")
    status = 0
    for ratio, limit_bytes in limits.items():
        rows = run_ratio(ratio, limit_bytes, arguments)
        print_tables(rows, limit_bytes)
        status |= check(rows, make_workloads(arguments))
    return status


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=absolute, default=DEFAULT_CACHE)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1.2, 2.0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repetition")
    parser.add_argument("--leg-limit", type=float, default=300, help="seconds, loading included")
    parser.add_argument("--cpus", type=_cpus, default=usable_cpus(2), help="such as 0,1")
    parser.add_argument("--json", type=Path, help="every outcome, a line each")
    parser.add_argument("--planner", default="milp", choices=("fixed", "milp"))
    parser.add_argument("--headroom-mib", type=int, default=96, help="beside Freight's budget")
    parser.add_argument("--freight-dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--block-rows", type=int, help="of Freight; without it the plan's")
    parser.add_argument("--sweep-tokens", type=int, help="of Freight")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=12)
    parser.add_argument("--prefix-prompt-tokens", type=int, default=160)
    parser.add_argument("--prefix-share", type=float, default=0.8)
    add_shape_arguments(parser)
    arguments = parser.parse_args()
    arguments.repetitions = 1 if arguments.quick else arguments.repetitions
    return arguments


def _cpus(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
