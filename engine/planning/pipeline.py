"""How long a sweep takes whose units are fetched into slots ahead of compute; knows seconds only."""

from collections.abc import Sequence
from typing import NamedTuple


class UnitTimes(NamedTuple):
    """Seconds of one unit: read from disk, copied to the GPU, computed with."""

    read_s: float
    copy_s: float
    compute_s: float


_SETTLING_SWEEPS = 2
"""Before the order repeats itself: a ring of slots forgets where it began within a turn."""


def sweep_seconds(units: Sequence[UnitTimes], *, num_slots: int, overlap: bool) -> float:
    """Of one sweep among many: the recurrence that the ring of slots follows, cyclic over sweeps.

    A unit is read once the one before it is read and the slot of the unit `num_slots` streamed
    units before is copied from; copied once its slot was computed with; computed when it is there
    and the one before is done. Units that stream nothing take no slot. Without `overlap` a unit is
    fetched when it is asked for.
    """
    if not overlap:
        return sum(unit.read_s + unit.copy_s + unit.compute_s for unit in units)
    read_end = copy_end = compute_end = swept = 0.0
    copied: list[float] = []
    drained: list[float] = []
    for _ in range(_SETTLING_SWEEPS + 1):
        swept = compute_end
        for unit in units:
            if unit.read_s or unit.copy_s:
                behind = len(copied) - num_slots
                free = drained[behind] if behind >= 0 else 0.0
                left = copied[behind] if behind >= 0 else 0.0
                # Without a copy the slot itself is read into; with one, its staging buffer.
                read_end = max(read_end, left if unit.copy_s else free) + unit.read_s
                copy_end = max(read_end, copy_end, free) + unit.copy_s if unit.copy_s else read_end
                compute_end = max(compute_end, copy_end) + unit.compute_s
                copied.append(copy_end)
                drained.append(compute_end)
            else:
                compute_end += unit.compute_s
    return compute_end - swept
