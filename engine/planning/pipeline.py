"""How long a sweep takes whose units are fetched into slots ahead of compute; knows seconds only."""

import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple


class UnitTimes(NamedTuple):
    """Seconds of one unit: read from disk, copied to the GPU, computed with."""

    read_s: float
    copy_s: float
    compute_s: float

    @property
    def is_streamed(self) -> bool:
        return bool(self.read_s or self.copy_s)


class Stage(NamedTuple):
    """`num_units` alike units that are visited one after the other. `num_forwards` go through all of
    them in turn, each with its part of the computing, and hold them until the last is through.
    """

    unit: UnitTimes
    num_units: int = 1
    num_forwards: int = 1


_SETTLING_TURNS: Final = 3
"""Of the ring, and sweeps at least, before the order repeats itself; then one turn is averaged."""

_MOST_FOLLOWED: Final = 64
"""Turns of the ring within alike stages that are followed one by one; the rest goes on likewise."""

_ALIKE: Final = 1e-9
"""Of a turn's seconds: clocks that keep their distances so well keep them for good."""


def sweep_seconds(stages: Sequence[Stage], *, num_slots: int, overlap: bool) -> float:
    """Of one sweep among many: the recurrence that the ring of slots follows, cyclic over sweeps.

    A unit is read once the one before it is read and the slot of the unit `num_slots` streamed
    units before is copied from; copied once its slot was computed with; computed when it is there
    and the one before is done. Units that stream nothing take no slot. Without `overlap` a unit is
    fetched when it is asked for. A stage that is held has no more units than there are slots.
    """
    if not overlap:
        return sum(stage.num_units * sum(stage.unit, start=0.0) for stage in stages)
    streamed = sum(stage.num_units for stage in stages if stage.unit.is_streamed)
    turn = max(1, math.ceil(num_slots / max(1, streamed)))  # sweeps
    runs = [(stage, len(list(alike))) for stage, alike in itertools.groupby(stages)]
    ring = _Ring(num_slots)
    settled_s = 0.0
    for sweep in range((_SETTLING_TURNS + 1) * turn):
        if sweep == _SETTLING_TURNS * turn:
            settled_s = ring.compute_end
        for stage, count in runs:
            ring.visit(stage, count)
    return (ring.compute_end - settled_s) / turn


class _Ring:
    """When reading, copying and computing are through with what they were given so far."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._read_end = self._copy_end = self.compute_end = 0.0
        # Of the last `num_slots` streamed units, the oldest first.
        self._copied = deque([0.0] * num_slots, maxlen=num_slots)
        self._drained = deque([0.0] * num_slots, maxlen=num_slots)

    def visit(self, stage: Stage, count: int) -> None:
        """`count` such stages, one after the other."""
        if not stage.unit.is_streamed:
            self.compute_end += count * stage.num_units * stage.unit.compute_s
            return
        if stage.num_forwards == 1 or stage.num_units == 1:
            stage, count = Stage(stage.unit), count * stage.num_units
        turn = max(1, self._num_slots // stage.num_units)  # stages that the slots go around in
        distances: list[float] = []
        for turns in range(1, count // turn + 1):
            began_s = self.compute_end
            self._follow(stage, turn)
            took_s = self.compute_end - began_s
            before, distances = distances, self._distances()
            if turns >= _MOST_FOLLOWED or _are_alike(before, distances, took_s):
                self._shift((count // turn - turns) * took_s)
                break
        self._follow(stage, count % turn)

    def _follow(self, stage: Stage, count: int) -> None:
        """Unit by unit: most of what a plan costs is here, so little is called and no field is read."""
        read_s, copy_s, compute_s = stage.unit
        part_s = compute_s / stage.num_forwards
        read_end, copy_end, compute_end = self._read_end, self._copy_end, self.compute_end
        copied, drained = self._copied, self._drained
        for _ in range(count):
            free = list(drained)
            for index in range(stage.num_units):
                free_s = free[min(index, len(free) - 1)]
                # Without a copy the slot itself is read into; with one, its staging buffer.
                left_s = copied[0] if copy_s else free_s
                read_end = max(read_end, left_s) + read_s
                there_s = read_end
                if copy_s:
                    there_s = copy_end = max(read_end, copy_end, free_s) + copy_s
                copied.append(there_s)
                compute_end = max(compute_end, there_s) + part_s
            if stage.num_forwards == 1:
                drained.append(compute_end)
                continue
            compute_end += (stage.num_forwards - 2) * stage.num_units * part_s
            for _unit in range(stage.num_units):
                compute_end += part_s
                drained.append(compute_end)
        self._read_end, self._copy_end, self.compute_end = read_end, copy_end, compute_end

    def _distances(self) -> list[float]:
        """Of all clocks from that of computing. A bus that carries nothing has no clock of its own."""
        copy_end = max(self._copy_end, self._copied[0])
        clocks = (self._read_end, copy_end, *self._copied, *self._drained)
        return [clock - self.compute_end for clock in clocks]

    def _shift(self, by_s: float) -> None:
        self._read_end += by_s
        self._copy_end += by_s
        self.compute_end += by_s
        for clocks in (self._copied, self._drained):
            for index, clock in enumerate(clocks):
                clocks[index] = clock + by_s


def _are_alike(before: Sequence[float], after: Sequence[float], took_s: float) -> bool:
    return len(before) == len(after) and all(
        abs(one - other) <= _ALIKE * took_s for one, other in zip(before, after, strict=True)
    )
