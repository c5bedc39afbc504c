"""A machine's profile for a person: one row a figure, curves by their points."""

from typing import TYPE_CHECKING, Final

from rich.table import Table

from cli.amounts import amount, spread, step_of

if TYPE_CHECKING:  # slow to import
    from engine.profiling.measurement import Figure, Measured, Measurement
    from engine.profiling.saved import Profile

_MOST_POINTS: Final = 6
_MICROSECOND_S: Final = 1e-6


def profile_table(measured: "Measured") -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("a second")
    table.add_column("spread", justify="right", no_wrap=True)
    by_row: dict[tuple[Figure, str], list[Measurement]] = {}
    for each in measured.measurements:
        by_row.setdefault((each.figure, each.kind), []).append(each)
    for (figure, kind), found in by_row.items():
        widest = max(each.rate.spread for each in found)
        table.add_row(str(figure), kind, _points(figure.unit, found), spread(widest))
    for device, costs in measured.overheads.items():
        told = ", ".join(
            f"{name} {seconds / _MICROSECOND_S:.0f} µs"
            for name, seconds in (
                ("a sweep", costs.sweep_s),
                ("a step", costs.step_s),
                ("a row", costs.row_s),
                ("a row's step", costs.row_step_s),
            )
        )
        table.add_row("overheads", device, told, "")
    return table


def profile_text(profile: "Profile") -> str:
    """What was measured, when and how."""
    measured = profile.measured
    tiers = (
        (measured.gpu_bytes, "GPU memory"),
        (measured.host_bytes, "host memory"),
        (measured.disk_bytes, f"disk at {profile.spill_dir}"),
    )
    how = "quickly" if profile.is_quick else "in full"
    return (
        f"{profile.machine}\nmeasured {how} at {profile.measured_at}\n"
        f"{', '.join(f'{amount(size)}B of {what}' for size, what in tiers if size)} may be used"
    )


def _points(unit: str, found: "list[Measurement]") -> str:
    short = "B" if unit == "bytes" else unit
    if len(found) == 1:
        return f"{amount(found[0].rate.per_s)}{short}"
    every = -(-len(found) // _MOST_POINTS)
    shown = found[::-1][::every][::-1]
    scale, prefix = step_of(max(each.rate.per_s for each in found))
    points = [f"{each.rate.per_s / scale:.3g} at {_at(unit, each.at or 0)}" for each in shown]
    return f"{prefix}{short}: {', '.join(points)}"


def _at(unit: str, at: int) -> str:
    if unit == "FLOP":
        return f"{at}"
    for size, name in ((2**20, "MiB"), (2**10, "KiB")):
        if at >= size:
            return f"{at // size} {name}"
    return f"{at} B"
