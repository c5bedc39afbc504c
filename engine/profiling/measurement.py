"""The figures of this machine as they were measured, each with its spread; measures nothing."""

import dataclasses
import enum
from collections.abc import Mapping

from engine.memory.stopwatch import Rate
from engine.profiling.overheads import Overheads


class Figure(enum.StrEnum):
    """What is measured. Values are what people read."""

    DISK_READ = "disk read"
    DISK_WRITE = "disk write"
    MEMORY_READ = "memory read"
    TO_GPU = "CPU to GPU"
    TO_GPU_PLAIN = "CPU to GPU, not pinned"
    TO_CPU = "GPU to CPU"
    TO_CPU_PLAIN = "GPU to CPU, not pinned"
    GEMM = "products"
    ATTENTION = "attention"
    PROMPTS = "attention of prompts"
    EXPANSION = "expansion"
    ELEMENTWISE = "between products"

    @property
    def unit(self) -> str:
        return "FLOP" if self in {Figure.GEMM, Figure.PROMPTS} else "bytes"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """`kind` tells devices and dtypes apart, like "cpu/float32" or "cpu/bfloat16->float32"; `at`
    are the bytes of a request, the rows of a product, the query heads to a key head or the tokens of
    a prompt, where there are several.
    """

    figure: Figure
    rate: Rate
    kind: str = ""
    at: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything; `overheads` are the compute tier's, by "cpu" and, where there is one, "gpu".
    `others_share` of the cores' time was others' meanwhile. `factors`: by term, how many times as long
    as all this foresees a run has taken.
    """

    host_bytes: int
    gpu_bytes: int
    disk_bytes: int
    measurements: tuple[Measurement, ...]
    overheads: dict[str, Overheads]
    others_share: float = 0.0
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def rate(self, figure: Figure, kind: str = "") -> float | None:
        """Of the one measurement that is no curve; None where nothing of the kind was measured."""
        return next((rate for _, rate in self.curve(figure, kind)), None)

    def curve(self, figure: Figure, kind: str = "") -> tuple[tuple[int, float], ...]:
        """(at, rate a second), ascending; empty where nothing of the kind was measured."""
        return tuple(
            (each.at or 0, each.rate.per_s)
            for each in self.measurements
            if each.figure is figure and each.kind == kind
        )

    def kinds(self, figure: Figure) -> tuple[str, ...]:
        """Those that were measured, in order."""
        found = [each.kind for each in self.measurements if each.figure is figure]
        return tuple(dict.fromkeys(found))

    def spread(self, figure: Figure) -> float:
        """The widest of its measurements; 0 where there are none."""
        found = (each.rate.spread for each in self.measurements if each.figure is figure)
        return max(found, default=0.0)
