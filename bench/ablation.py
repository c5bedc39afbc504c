"""FlexGen's own loop and Freight's, and the steps between, over one engine: what each step brings.

Knows schedules, jobs and a table; not which model they are for. FlexGen's loop takes a block, pads
its prompts to the longest and runs all of its rows to the longest limit before it takes the next.
Only tokens that were asked for count.
"""

import argparse
import dataclasses
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self

from bench.machine import machine_profile
from bench.peers import DEFAULT_CACHE, absolute
from bench.policies import planned, situation_of
from bench.workloads import Request
from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.memory.measure import measure_budgets
from engine.planning.planners import PLANNERS
from engine.planning.planners.base import Wishes
from engine.planning.policy import Policy
from engine.planning.shape import ModelShape
from engine.sweep.report import Report
from engine.timeline import WEIGHT_LINKS

_GIB: Final = 2**30
_TITLES: Final = (
    "useful output tok/s (min-max) | of FlexGen's loop | sweeps | computed tokens a useful one "
    "| of the link | of the products | of the roofline"
)
_FIRST_TOKEN: Final = 2  # 0 and 1 begin and end a sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What is done for a block and what is not."""

    name: str
    looks_ahead: bool
    """Weights of coming layers are fetched while others compute."""
    is_padded: bool
    """Prompts to the longest of the block, and every row generates to the longest limit."""
    is_static: bool
    """No row comes in before all are done."""
    shares_prefixes: bool


FLEXGEN: Final = Schedule(
    name="FlexGen's loop",
    looks_ahead=False,
    is_padded=True,
    is_static=True,
    shares_prefixes=False,
)


def schedules() -> tuple[Schedule, ...]:
    """From FlexGen's loop to Freight's own, one thing after the other."""
    ahead = dataclasses.replace(FLEXGEN, name="and looking ahead", looks_ahead=True)
    ragged = dataclasses.replace(ahead, name="and without padding", is_padded=False)
    refilled = dataclasses.replace(ragged, name="and refilled", is_static=False)
    whole = dataclasses.replace(refilled, name="and prefixes shared: Freight", shares_prefixes=True)
    return FLEXGEN, ahead, ragged, refilled, whole


def blocks(
    requests: Sequence[Request], schedule: Schedule, *, kv_tokens: int, block_rows: int, vocab: int
) -> Iterator[list[Request]]:
    """What is handed to the engine at once, as the schedule has it. A static block is as large as
    keys and values have room for all of its rows at their longest.
    """
    size = len(requests)
    if schedule.is_static:
        longest = max(len(r.token_ids) for r in requests) + max(r.max_tokens for r in requests)
        size = max(1, min(block_rows, kv_tokens // longest))
    numbers = itertools.count()
    for start in range(0, len(requests), size):
        block = list(requests[start : start + size])
        if schedule.is_padded:
            block = padded(block)
        if not schedule.shares_prefixes:
            block = [unshared(request, next(numbers), vocab) for request in block]
        yield block


def padded(block: Sequence[Request]) -> list[Request]:
    """On the left, with a token like any other: all lengths and all limits are the longest."""
    longest = max(len(request.token_ids) for request in block)
    limit = max(request.max_tokens for request in block)
    return [
        Request(
            key=request.key,
            token_ids=(_FIRST_TOKEN,) * (longest - len(request.token_ids)) + request.token_ids,
            max_tokens=limit,
        )
        for request in block
    ]


def unshared(request: Request, number: int, vocab: int) -> Request:
    """The same length, but beginning as no other: with the number, in tokens."""
    num_tokens = vocab - _FIRST_TOKEN
    start = (_FIRST_TOKEN + number // num_tokens, _FIRST_TOKEN + number % num_tokens)
    kept = len(request.token_ids)
    return dataclasses.replace(request, token_ids=(*start, *request.token_ids[2:])[:kept])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One run of the whole job."""

    schedule: Schedule
    seconds: float
    useful_tokens: int
    report: Report

    @property
    def tokens_per_s(self) -> float:
        return self.useful_tokens / self.seconds

    @property
    def computed_tokens(self) -> int:
        return self.report.prompt_tokens + self.report.generated_tokens

    @property
    def link_share(self) -> float | None:
        """Of the busiest weight link's ceiling, over the whole run."""
        link, ceilings = self.report.bottleneck, self.report.ceilings
        rate = ceilings.of(link) if link is not None and ceilings is not None else None
        if link is None or not rate:
            return None
        return self.report.totals[link].num_bytes / self.report.sweep_s / rate

    @property
    def gemm_share(self) -> float | None:
        """Of the ceiling of products, over the whole run."""
        if self.report.ceilings is None:
            return None
        return self.report.flops / self.report.sweep_s / self.report.ceilings.gemm_flops_per_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and how often the job runs; None leaves it to the engine."""

    cache: Path
    device: str
    gpu_bytes: int | None
    host_bytes: int | None
    block_rows: int | None
    repetitions: int
    profile: Path | None
    """Of the machine, to plan by; else fixed rules decide."""
    schedules: tuple[Schedule, ...]

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Self:
        on_gpu = arguments.device == "cuda"
        return cls(
            cache=arguments.cache,
            device=arguments.device,
            gpu_bytes=_gib(arguments.gpu_gib) if on_gpu else 0,
            host_bytes=_gib(arguments.host_gib),
            block_rows=arguments.block_rows,
            repetitions=arguments.repetitions,
            profile=_profile(arguments),
            schedules=tuple(schedules()[step] for step in arguments.steps),
        )


def _profile(arguments: argparse.Namespace) -> Path | None:
    if arguments.planner == "fixed":
        return None
    given: Path | None = arguments.profile
    return given or machine_profile(arguments.cache)


def add_arguments(parser: argparse.ArgumentParser, *, gpu_gib: float | None) -> None:
    parser.add_argument("--cache", type=absolute, default=DEFAULT_CACHE)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--gpu-gib", type=float, default=gpu_gib, help="budget; else what is free")
    parser.add_argument("--host-gib", type=float, help="budget; else a share of what is free")
    parser.add_argument("--planner", choices=list(PLANNERS), default="milp")
    parser.add_argument("--profile", type=Path, help="of the machine; else it is measured, once")
    parser.add_argument("--block-rows", type=int, help="else as the planner likes")
    parser.add_argument("--repetitions", type=int, default=1)
    every = range(len(schedules()))
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        choices=every,
        default=every,
        help="from 0, FlexGen's loop, to the last, Freight's; in the order given",
    )
    parser.add_argument("--rows", type=int, default=256, help="prompts of the job")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=32)


def _gib(number: float | None) -> int | None:
    return None if number is None else int(number * _GIB)


def measure(
    checkpoint: Path, requests: Sequence[Request], *, vocab: int, setting: Setting
) -> list[Ran]:
    """Every schedule in turn, and that as often as is asked."""
    situation = None
    if setting.profile is not None:
        on_gpu = setting.device == "cuda"
        situation = situation_of(checkpoint, requests, setting.profile, on_gpu=on_gpu)
    wishes = Wishes(block_rows=setting.block_rows, situation=situation)
    return [
        _run(checkpoint, requests, schedule, vocab=vocab, setting=setting, wishes=wishes)
        for _ in range(setting.repetitions)
        for schedule in setting.schedules
    ]


def _run(
    checkpoint: Path,
    requests: Sequence[Request],
    schedule: Schedule,
    *,
    vocab: int,
    setting: Setting,
    wishes: Wishes,
) -> Ran:
    kv_tokens = 0

    def policy(shape: ModelShape, budgets: Budgets) -> Policy:
        nonlocal kv_tokens
        chosen = planned(shape, budgets, wishes, padded(requests))
        kv_tokens = chosen.kv.total_bytes // shape.kv_bytes_per_token
        return dataclasses.replace(chosen, overlap=schedule.looks_ahead)

    gc.collect()  # models are cycles, and the weights of the last one would count as this one's
    budgets = measure_budgets(
        spill_dir=setting.cache / "spill",
        gpu_bytes=setting.gpu_bytes,
        host_bytes=setting.host_bytes,
    )
    started_s = time.perf_counter()
    with Engine.load(checkpoint, budgets=budgets, policy=policy) as engine:
        load_s = time.perf_counter() - started_s
        list(engine.generate([_prompt(Request(key="warm-up", token_ids=(2,), max_tokens=2))]))
        before = engine.report()
        started_s = time.perf_counter()
        for block in blocks(
            requests,
            schedule,
            kv_tokens=kv_tokens,
            block_rows=engine.block_rows,
            vocab=vocab,
        ):
            list(engine.generate(map(_prompt, block)))
        seconds = time.perf_counter() - started_s
        report = engine.report().since(before)
    print(
        f"  {schedule.name}: {seconds:.1f} s, after {load_s:.1f} s of loading; {account(report)}",
        file=sys.stderr,
    )
    return Ran(
        schedule=schedule,
        seconds=seconds,
        useful_tokens=sum(request.max_tokens for request in requests),
        report=report,
    )


def account(report: Report) -> str:
    """What lies behind a run's figure, in a line."""
    parts = [
        report.policy_reason,
        f"{report.peak_rows} rows",
        *(
            f"{total.num_bytes / 1e9:.1f} GB in {total.covered_s:.1f} s of {track}"
            for track, total in report.totals.items()
            if total.covered_s
        ),
        f"waited {report.weights_waited_s:.1f} s",
        *(f"{tier} {peak / 2**30:.1f} GiB at most" for tier, peak in report.peak_bytes.items()),
    ]
    return "; ".join(parts)


def _prompt(request: Request) -> Prompt:
    sampling = Sampling(max_tokens=request.max_tokens, ignore_eos=True)
    return Prompt(key=request.key, token_ids=request.token_ids, sampling=sampling)


def table(runs: Sequence[Ran]) -> str:
    """A line for each schedule; times over FlexGen's loop are of medians."""
    lines = [
        f"| | {_TITLES} |",
        "|" + 8 * "---|",
    ]
    names = dict.fromkeys(run.schedule.name for run in runs)
    of_flexgen = [run for run in runs if run.schedule.name == FLEXGEN.name]
    base = _median(of_flexgen) if of_flexgen else None
    for name in names:
        own = [run for run in runs if run.schedule.name == name]
        rates = [run.tokens_per_s for run in own]
        last = own[-1]
        cells = [
            name,
            f"{_median(own):.2f} ({min(rates):.2f}-{max(rates):.2f})",
            "" if base is None else f"{_median(own) / base:.2f} x",
            str(last.report.num_sweeps),
            f"{last.computed_tokens / last.useful_tokens:.2f}",
            *map(_percent, (last.link_share, last.gemm_share, last.report.roofline_share)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _median(runs: Sequence[Ran]) -> float:
    return statistics.median(run.tokens_per_s for run in runs)


def ceilings(runs: Sequence[Ran]) -> str:
    """What the table's shares are of, as the last run's engine measured it."""
    found = runs[-1].report.ceilings
    assert found is not None, "an engine measures its ceilings when it is loaded"
    rates = [
        f"{link} {rate / 1e9:.2f} GB/s"
        for link in WEIGHT_LINKS
        if (rate := found.of(link)) is not None
    ]
    return ", ".join([*rates, f"products {found.gemm_flops_per_s / 1e12:.3f} TFLOP/s"])
