"""Which units of a layer are still needed while its forwards go through them. Reads nothing and knows
no slots.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence


class Uses:
    """One layer, visit after visit. `units_of` says of each weight, by name, which unit each of its
    streamed slices lies in.

    A forward goes through the slices of a weight in order, within one call of the module that holds
    it: to ask for a slice ends the use of those before it, and the call's end that of all. A unit is
    over when every one of its slices was used as often as there are forwards.
    """

    def __init__(self, units_of: Mapping[str, Sequence[int]]) -> None:
        self._units_of = units_of
        self._left: Counter[int] = Counter()
        self._num_ended: dict[str, int] = {}
        self._first: dict[str, int] = {}  # by module: the how-manieth it was in this visit

    def begin(self, num_forwards: int) -> None:
        self._left.clear()
        for units in self._units_of.values():
            for unit in units:
                self._left[unit] += num_forwards
        self._num_ended = dict.fromkeys(self._units_of, 0)
        self._first.clear()

    def ask(self, weight: str, index: int) -> int:
        """A slice is wanted now: the unit that it lies in."""
        self._first.setdefault(_module(weight), len(self._first))
        self._end_to(weight, index)
        return self._units_of[weight][index]

    def end(self, weight: str) -> None:
        """A call of the module that holds it is over."""
        self._end_to(weight, len(self._units_of[weight]))
        self._num_ended[weight] = 0

    def is_over(self, unit: int) -> bool:
        return self._left[unit] <= 0

    def in_order(self, units: Sequence[int]) -> list[int]:
        """The units as the modules came in this visit; those of modules that did not come last."""
        places = dict.fromkeys(units, math.inf)
        for weight, held_in in self._units_of.items():
            for unit in held_in:
                places[unit] = min(places[unit], self._first.get(_module(weight), math.inf))
        return sorted(units, key=lambda unit: places[unit])

    def _end_to(self, weight: str, index: int) -> None:
        for unit in self._units_of[weight][self._num_ended[weight] : index]:
            self._left[unit] -= 1
        self._num_ended[weight] = max(self._num_ended[weight], index)


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]
