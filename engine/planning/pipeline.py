"""How long a sweep takes whose units are fetched into slots ahead of compute; knows seconds only."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class UnitTimes(NamedTuple):
    """Seconds of one unit: read from disk, copied to the GPU, computed with."""

    read_s: float
    copy_s: float
    compute_s: float


_SETTLING_TURNS = 3
"""Of the ring, and sweeps at least, before the order repeats itself; then one turn is averaged."""


def sweep_seconds(units: Sequence[UnitTimes], *, num_slots: int, overlap: bool) -> float:
    """Of one sweep among many: the recurrence that the ring of slots follows, cyclic over sweeps.

    A unit is read once the one before it is read and the slot of the unit `num_slots` streamed
    units before is copied from; copied once its slot was computed with; computed when it is there
    and the one before is done. Units that stream nothing take no slot. Without `overlap` a unit is
    fetched when it is asked for.
    """
    if not overlap:
        return sum(unit.read_s + unit.copy_s + unit.compute_s for unit in units)
    streamed = sum(1 for unit in units if unit.read_s or unit.copy_s)
    turn = max(1, math.ceil(num_slots / max(1, streamed)))  # sweeps
    read_end = copy_end = compute_end = settled = 0.0
    copied: list[float] = []
    drained: list[float] = []
    for sweep in range((_SETTLING_TURNS + 1) * turn):
        if sweep == _SETTLING_TURNS * turn:
            settled = compute_end
        for unit in units:
            if unit.read_s or unit.copy_s:
                behind = len(copied) - num_slots
                free = drained[behind] if behind >= 0 else 0.0
                left = copied[behind] if behind >= 0 else 0.0
                # Without a copy the slot itself is read into; with one, its staging buffer.
                read_end = max(read_end, left if unit.copy_s else free) + unit.read_s
                there = read_end
                if unit.copy_s:
                    there = copy_end = max(read_end, copy_end, free) + unit.copy_s
                compute_end = max(compute_end, there) + unit.compute_s
                copied.append(there)
                drained.append(compute_end)
            else:
                compute_end += unit.compute_s
    return (compute_end - settled) / turn
