"""What several looks at a machine come to: the mean of each figure. Measures nothing.

A machine that is shared is another one from minute to minute, and so are its figures: what is looked at
once is measured in one of its states. A job meets all of them: of seconds the mean counts.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from engine.memory.stopwatch import Rate
from engine.profiling.measurement import Measurement
from engine.profiling.overheads import Overheads
from engine.profiling.probe import Probed


@dataclasses.dataclass(slots=True)
class Look:
    """All of a machine, looked at once. `overheads` are by device."""

    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    overheads: dict[str, Overheads] = dataclasses.field(default_factory=dict)
    probed: Probed | None = None


def mean_measurements(looks: Sequence[Sequence[Measurement]]) -> tuple[Measurement, ...]:
    """Of looks that measured the same in the same order: the rate of their mean seconds, and as its
    spread the widest of a look's own and of the range of all looks over that.
    """
    return tuple(_mean(alike) for alike in zip(*looks, strict=True))


def mean_overheads(looks: Sequence[Mapping[str, Overheads]]) -> dict[str, Overheads]:
    """Of each device, each of them for itself."""
    return {
        device: Overheads(
            **{
                field.name: statistics.fmean(getattr(look[device], field.name) for look in looks)
                for field in dataclasses.fields(Overheads)
            }
        )
        for device in looks[0]
    }


def _mean(alike: Sequence[Measurement]) -> Measurement:
    first = alike[0]
    assert all(
        (each.figure, each.kind, each.at) == (first.figure, first.kind, first.at) for each in alike
    )
    rates = [each.rate.per_s for each in alike]
    mean = statistics.harmonic_mean(rates)
    spreads = [each.rate.spread for each in alike]
    rate = Rate(per_s=mean, spread=max(*spreads, (max(rates) - min(rates)) / mean))
    return dataclasses.replace(first, rate=rate)
