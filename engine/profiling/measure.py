"""All that a plan asks of this machine, measured once: links, kernels, overheads, capacities."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import torch

from engine.compute.elementwise import elementwise_rate
from engine.compute.gemm import kernels_for
from engine.compute.lost import lost_beside_fetches, lost_beside_reads
from engine.compute.rates import (
    attention_rate,
    expansion_rates,
    gemm_rates,
    product_overhead_s,
    prompt_rate,
)
from engine.errors import EngineError
from engine.memory.allocator import keep_freed_memory
from engine.memory.links import copy_rate, disk_rates, memory_read_rate
from engine.memory.measure import measure_budgets
from engine.planning.policy import Tier
from engine.planning.units import UNIT_BYTES
from engine.profiling.description import hardware_of
from engine.profiling.factors import factors_of
from engine.profiling.looks import Look, mean_measurements, mean_overheads
from engine.profiling.measurement import Figure, Measured, Measurement
from engine.profiling.others import OthersWatch
from engine.profiling.overheads import Overheads, measure_overheads
from engine.profiling.probe import Probe, run_probes

Progress = Callable[[int, int, str], None]
"""Steps done, steps in all, and what the next one is; empty at the end."""

_CPU: Final = torch.device("cpu")
_STORED: Final = (torch.bfloat16, torch.float16)
_MOST_SLOW_ROWS: Final = 64
"""Of products of float16 on a CPU, which may have no instructions for them: prompts seldom attend
there.
"""
_COPIES: Final = (
    (Figure.TO_GPU, True, True),
    (Figure.TO_GPU_PLAIN, True, False),
    (Figure.TO_CPU, False, True),
    (Figure.TO_CPU_PLAIN, False, False),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long is looked at what: `seconds` for each figure, in each of so many `looks`."""

    looks: int
    seconds: float
    overhead_s: float
    gemm_rows: tuple[int, ...]
    expanding_rows: tuple[int, ...]
    heads_per_key: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    request_bytes: tuple[int, ...]
    file_bytes: int
    scanned_bytes: int
    probe: Probe


FULL: Final = Effort(
    looks=3,
    seconds=0.2,
    overhead_s=2.4,
    gemm_rows=tuple(2**power for power in range(11)),
    expanding_rows=(4, 32, 256, 1024),
    heads_per_key=(1, 4, 8),
    prompt_tokens=(16, 64, 256, 1024),
    request_bytes=tuple(2**power for power in (14, 16, 18, 20, 22, 23, 25, 26)),
    file_bytes=2**28,
    scanned_bytes=2**28,
    probe=Probe(
        layers=2, hidden=1024, rows=64, rows_a_sweep=4, prompt_tokens=32, output_tokens=16, rounds=2
    ),
)
"""Nearly two minutes."""

QUICK: Final = Effort(
    looks=1,
    seconds=0.03,
    overhead_s=0.5,
    gemm_rows=(1, 8, 32, 128, 512),
    expanding_rows=(16, 128),
    heads_per_key=(1, 4),
    prompt_tokens=(32, 256),
    request_bytes=(2**16, 2**20, 2**23, 2**25),
    file_bytes=2**26,
    scanned_bytes=2**26,
    probe=Probe(
        layers=2, hidden=512, rows=32, rows_a_sweep=4, prompt_tokens=32, output_tokens=12, rounds=2
    ),
)
"""Some ten seconds."""

_Figures = tuple[str, Callable[[], Sequence[Measurement]]]
_Step = tuple[str, Callable[[Look], None]]


def measure(spill_dir: Path, *, effort: Effort, progress: Progress | None = None) -> Measured:
    """To be done while nothing else runs or is in memory. At most `effort.file_bytes` of the spill
    folder, and what is in it, are taken and given back. Raises EngineError.
    """
    keep_freed_memory()
    budgets = measure_budgets(spill_dir=spill_dir)
    others = OthersWatch()
    has_gpu = budgets.gpu_bytes > 0
    tell = progress or (lambda done, total, name: None)
    steps = _steps(spill_dir, effort, has_gpu=has_gpu)
    total = effort.looks * len(steps)
    looks = [Look() for _ in range(effort.looks)]
    for done, (look, (name, step)) in enumerate(itertools.product(looks, steps)):
        tell(done, total, name)
        step(look)
    tell(total, total, "")
    measured = Measured(
        host_bytes=budgets.host_bytes,
        gpu_bytes=budgets.gpu_bytes,
        disk_bytes=budgets.disk_bytes,
        measurements=mean_measurements([look.measurements for look in looks]),
        overheads=mean_overheads([look.overheads for look in looks]),
        others_share=others.share(),
    )
    hardware = hardware_of(measured, {"cpu": "this one"})
    probed = [look.probed for look in looks if look.probed is not None]
    assert len(probed) == effort.looks, "small jobs are a step of every look"
    factors = factors_of(hardware, probed, on_gpu=has_gpu)
    return dataclasses.replace(measured, factors=factors)


def _steps(spill_dir: Path, effort: Effort, *, has_gpu: bool) -> list[_Step]:
    """Of one look: every figure, then overheads, then small jobs."""

    def figures(read: Callable[[], Sequence[Measurement]], look: Look) -> None:
        look.measurements += read()

    def overheads(device: str, look: Look) -> None:
        look.overheads[device] = _overheads(spill_dir, effort, device)

    def probes(look: Look) -> None:
        look.probed = run_probes(spill_dir, effort.probe, on_gpu=has_gpu)

    read = [*_of_links(spill_dir, effort, has_gpu=has_gpu), *_of_units(effort, has_gpu=has_gpu)]
    return [
        *((name, functools.partial(figures, each)) for name, each in read),
        *(
            (f"overheads on the {device}", functools.partial(overheads, device))
            for device in (("cpu", "gpu") if has_gpu else ("cpu",))
        ),
        ("a run", probes),
    ]


def _of_links(spill_dir: Path, effort: Effort, *, has_gpu: bool) -> Iterator[_Figures]:
    yield "disk", functools.partial(_disk, spill_dir, effort)
    yield "memory", functools.partial(_memory, _CPU, effort)
    if has_gpu:
        yield "memory of the GPU", functools.partial(_memory, torch.device("cuda"), effort)
        for figure, to_gpu, pinned in _COPIES:
            copy = functools.partial(_copy, figure, effort, to_gpu=to_gpu, pinned=pinned)
            yield str(figure), copy


def _of_units(effort: Effort, *, has_gpu: bool) -> Iterator[_Figures]:
    computing = [(_CPU, torch.float32), (_CPU, torch.bfloat16)]
    if has_gpu:
        # Keys and values of a GPU's dtype may be attended to where they lie.
        computing += [(_CPU, torch.float16)]
        computing += [(torch.device("cuda"), each) for each in (*_STORED, torch.float32)]
    for device, dtype in computing:
        kind = kind_of(device, dtype)
        yield f"products, {kind}", functools.partial(_gemm, device, dtype, effort)
        yield f"attention, {kind}", functools.partial(_attention, device, dtype, effort)
        yield f"prompts, {kind}", functools.partial(_prompts, device, dtype, effort)
        between = functools.partial(_elementwise, device, dtype, effort)
        yield f"between products, {kind}", between
        for stored in (torch.float32, *_STORED):
            if stored is not dtype or len(kernels_for(dtype, device)) > 1:
                expand = functools.partial(_expansion, device, dtype, stored, effort)
                yield f"{_name(stored)} to {kind}", expand


def kind_of(device: torch.device, dtype: torch.dtype) -> str:
    """Like "gpu/bfloat16"."""
    return f"{'gpu' if device.type == 'cuda' else device.type}/{_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _disk(spill_dir: Path, effort: Effort) -> list[Measurement]:
    try:
        rates = disk_rates(
            spill_dir,
            effort.request_bytes,
            file_bytes=effort.file_bytes,
            seconds=effort.seconds,
        )
    except OSError as error:
        raise _not_measured(spill_dir, effort, error) from error
    return [
        Measurement(figure=figure, rate=rate, at=each.request_bytes)
        for figure in (Figure.DISK_READ, Figure.DISK_WRITE)
        for each in rates
        for rate in [each.read if figure is Figure.DISK_READ else each.write]
    ]


def _not_measured(spill_dir: Path, effort: Effort, error: OSError) -> EngineError:
    return EngineError(
        f"{spill_dir} cannot be measured with a file of {effort.file_bytes:,} bytes: "
        f"{error.strerror or error}"
    )


def _memory(device: torch.device, effort: Effort) -> list[Measurement]:
    rate = memory_read_rate(device, num_bytes=effort.scanned_bytes, seconds=effort.seconds)
    kind = "gpu" if device.type == "cuda" else "cpu"
    return [Measurement(figure=Figure.MEMORY_READ, kind=kind, rate=rate)]


def _copy(figure: Figure, effort: Effort, *, to_gpu: bool, pinned: bool) -> list[Measurement]:
    rate = copy_rate(
        torch.device("cuda"),
        to_gpu=to_gpu,
        pinned=pinned,
        num_bytes=effort.scanned_bytes,
        seconds=effort.seconds,
    )
    return [Measurement(figure=figure, rate=rate)]


def _gemm(device: torch.device, dtype: torch.dtype, effort: Effort) -> list[Measurement]:
    kind = kind_of(device, dtype)
    rows = _bearable(effort.gemm_rows, device, dtype)
    rates = gemm_rates(rows, dtype=dtype, device=device, seconds=effort.seconds)
    return [
        Measurement(figure=Figure.GEMM, kind=kind, at=each.rows, rate=each.rate) for each in rates
    ]


def _bearable(rows: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[int, ...]:
    if (device, dtype) != (_CPU, torch.float16):
        return rows
    return tuple(each for each in rows if each <= _MOST_SLOW_ROWS)


def _attention(device: torch.device, dtype: torch.dtype, effort: Effort) -> list[Measurement]:
    return [
        Measurement(
            figure=Figure.ATTENTION,
            kind=kind_of(device, dtype),
            at=count,
            rate=attention_rate(
                heads_per_key=count, dtype=dtype, device=device, seconds=effort.seconds
            ),
        )
        for count in effort.heads_per_key
    ]


def _prompts(device: torch.device, dtype: torch.dtype, effort: Effort) -> list[Measurement]:
    return [
        Measurement(
            figure=Figure.PROMPTS,
            kind=kind_of(device, dtype),
            at=count,
            rate=prompt_rate(count, dtype=dtype, device=device, seconds=effort.seconds),
        )
        for count in effort.prompt_tokens
    ]


def _elementwise(device: torch.device, dtype: torch.dtype, effort: Effort) -> list[Measurement]:
    rate = elementwise_rate(dtype=dtype, device=device, seconds=effort.seconds)
    return [Measurement(figure=Figure.ELEMENTWISE, kind=kind_of(device, dtype), rate=rate)]


def _expansion(
    device: torch.device, dtype: torch.dtype, stored: torch.dtype, effort: Effort
) -> list[Measurement]:
    rows = _bearable(effort.expanding_rows, device, dtype)
    rates = expansion_rates(rows, stored, dtype=dtype, device=device, seconds=effort.seconds)
    kind = f"{kind_of(device, stored)}->{_name(dtype)}"
    return [
        Measurement(figure=Figure.EXPANSION, kind=kind, at=each.rows, rate=each.rate)
        for each in rates
    ]


def _overheads(spill_dir: Path, effort: Effort, device: str) -> Overheads:
    """Products on a GPU are asked for and not waited for."""
    found = measure_overheads(spill_dir, on_gpu=device == "gpu", seconds=effort.overhead_s)
    if device == "gpu":
        return found
    try:
        read = lost_beside_reads(
            spill_dir,
            request_bytes=UNIT_BYTES[Tier.CPU],
            file_bytes=effort.file_bytes,
            seconds=effort.overhead_s / 4,
        )
        fetched = lost_beside_fetches(spill_dir, seconds=effort.overhead_s / 4)
    except OSError as error:
        raise _not_measured(spill_dir, effort, error) from error
    return dataclasses.replace(
        found,
        product_s=product_overhead_s(seconds=effort.seconds),
        lost_beside_reads=read,
        lost_beside_fetches=fetched,
    )
