"""What several looks at a machine come to: the middle of each figure. Measures nothing.

A machine that is shared is another one from minute to minute, and so are its figures: what is looked at
once is measured in one of its states.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from engine.memory.stopwatch import Rate
from engine.profiling.measurement import Measurement
from engine.profiling.overheads import Overheads
from engine.profiling.probe import Ran


@dataclasses.dataclass(slots=True)
class Look:
    """All of a machine, looked at once. `overheads` are by device."""

    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    overheads: dict[str, Overheads] = dataclasses.field(default_factory=dict)
    probed: tuple[Ran, ...] = ()


def middle_measurements(looks: Sequence[Sequence[Measurement]]) -> tuple[Measurement, ...]:
    """Of looks that measured the same in the same order: the median rate, and as its spread the widest of
    a look's own and of the range of all looks over their median.
    """
    return tuple(_middle(alike) for alike in zip(*looks, strict=True))


def middle_overheads(looks: Sequence[Mapping[str, Overheads]]) -> dict[str, Overheads]:
    """Of each device, each of them for itself."""
    return {
        device: Overheads(
            **{
                field.name: statistics.median(getattr(look[device], field.name) for look in looks)
                for field in dataclasses.fields(Overheads)
            }
        )
        for device in looks[0]
    }


def _middle(alike: Sequence[Measurement]) -> Measurement:
    first = alike[0]
    assert all(
        (each.figure, each.kind, each.at) == (first.figure, first.kind, first.at) for each in alike
    )
    rates = [each.rate.per_s for each in alike]
    middle = statistics.median(rates)
    spreads = [each.rate.spread for each in alike]
    rate = Rate(per_s=middle, spread=max(*spreads, (max(rates) - min(rates)) / middle))
    return dataclasses.replace(first, rate=rate)
