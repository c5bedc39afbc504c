"""A machine for a person: one row a figure, curves by some of their points."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from rich.table import Table

from cli.amounts import amount, spread, step_of

if TYPE_CHECKING:  # torch comes with the room beside it
    from engine.planning.hardware import Hardware, RateCurve

_MOST_POINTS: Final = 6
_MICROSECOND_S: Final = 1e-6
_ONE_RATE: Final = (
    ("to_gpu_pinned_bytes_per_s", "CPU to GPU", "pinned"),
    ("to_gpu_plain_bytes_per_s", "CPU to GPU", "plain"),
    ("from_gpu_bytes_per_s", "GPU to CPU", "pinned"),
    ("memory_bytes_per_s", "memory read", "cpu"),
)


def profile_table(hardware: "Hardware") -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("a second")
    table.add_column("spread", justify="right", no_wrap=True)
    for field, what, kind, told in _rows(hardware):
        width = hardware.spread.get(field)
        table.add_row(what, kind, told, "" if width is None else spread(width))
    overheads = (
        ("a sweep", hardware.sweep_overhead_s),
        ("a layer's step", hardware.layer_overhead_s),
        ("a row", hardware.row_overhead_s),
        ("a row's layer", hardware.row_layer_overhead_s),
        ("a prompt's layer", hardware.prompt_layer_overhead_s),
        ("an expert", hardware.expert_overhead_s),
        ("a product", hardware.product_overhead_s),
        ("a streamed unit", hardware.unit_overhead_s),
    )
    costs = ", ".join(f"{what} {cost_s / _MICROSECOND_S:.0f} µs" for what, cost_s in overheads)
    table.add_row("overheads", "", costs, "")
    for what, lost in (
        ("reads", hardware.lost_beside_reads),
        ("fetches", hardware.lost_beside_fetches),
    ):
        if lost:
            table.add_row(f"lost beside {what}", "cpu", f"{lost:.0%}", "")
    return table


def profile_text(hardware: "Hardware") -> str:
    """Which machine, when and of what."""
    tiers = (
        (hardware.gpu_bytes, "GPU memory"),
        (hardware.host_bytes, "host memory"),
        (hardware.disk_bytes, "disk"),
    )
    facts = ", ".join(f"{name} {value}" for name, value in hardware.versions.items())
    may_use = ", ".join(f"{amount(size)}B of {what}" for size, what in tiers if size)
    told = f"{hardware.name}, of {hardware.measured_on}\n{facts}\n{may_use} may be used"
    if hardware.others_share:
        told += f"\nmeasured while others had {hardware.others_share:.1%} of the cores' time"
        told += ": too much, so that it is measured anew next time" if hardware.is_crowded else ""
    return told


def _rows(hardware: "Hardware") -> Iterator[tuple[str, str, str, str]]:
    """Field, what it is, of what kind, and its rates as text."""
    yield "disk_read", "disk read", "", _requests(hardware.disk_read)
    yield "disk_write", "disk write", "", _requests(hardware.disk_write)
    for field, what, kind in _ONE_RATE:
        if (rate := getattr(hardware, field)) is not None:
            yield field, what, kind, f"{amount(rate)}B"
    for kind, curve in hardware.gemm.items():
        yield "gemm", "products", kind, _points(curve, "FLOP", lambda rows: f"{rows:.0f}")
    for kind, curve in hardware.attention_bytes_per_s.items():
        told = _points(curve, "B", lambda heads: f"{heads:.0f}:1")
        yield "attention_bytes_per_s", "attention", kind, told
    for kind, curve in hardware.prompt_flops_per_s.items():
        told = _points(curve, "FLOP", lambda tokens: f"{tokens:.0f}")
        yield "prompt_flops_per_s", "attention of prompts", kind, told
    for kind, curve in hardware.expand_bytes_per_s.items():
        yield "expand_bytes_per_s", "expansion", kind, _points(curve, "B", lambda n: f"{n:.0f}")
    for kind, rate in hardware.elementwise_bytes_per_s.items():
        yield "elementwise_bytes_per_s", "between products", kind, f"{amount(rate)}B"


def _requests(curve: "RateCurve") -> str:
    return _points(curve, "B", _request)


def _points(curve: "RateCurve", unit: str, told: Callable[[float], str]) -> str:
    """The last point, and others evenly before it."""
    if len(curve.points) == 1:
        return f"{amount(curve.points[0][1])}{unit}"
    every = -(-len(curve.points) // _MOST_POINTS)
    shown = curve.points[::-1][::every][::-1]
    scale, prefix = step_of(max(rate for _, rate in shown))
    points = ", ".join(f"{rate / scale:.3g} at {told(size)}" for size, rate in shown)
    return f"{prefix}{unit}: {points}"


def _request(size: float) -> str:
    for step, name in ((2**20, "MiB"), (2**10, "KiB")):
        if size >= step:
            return f"{size / step:.0f} {name}"
    return f"{size:.0f} B"
