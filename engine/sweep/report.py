"""What the engine achieved, beside what this machine could: the run's own roofline, numbers only."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from engine.planning.ceilings import Ceilings
from engine.planning.policy import Tier
from engine.timeline import COMPUTE, WEIGHT_LINKS, Total, Track

_TOLD_TRACKS: Final = tuple(track for track in Track if track is not Track.SWEEP)
_IN_FLOPS: Final = (Track.LAYERS, Track.HEAD)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One link or unit: what it did in `busy_s` wall seconds, beside its measured ceiling.

    `unit` is "bytes", "FLOP", or empty where only time is told; then there are no rates.
    """

    name: str
    unit: str
    amount: int
    busy_s: float
    ceiling_per_s: float | None

    @property
    def per_s(self) -> float | None:
        return self.amount / self.busy_s if self.unit and self.busy_s else None

    @property
    def share(self) -> float | None:
        """Achieved over ceiling."""
        if self.per_s is None or not self.ceiling_per_s:
            return None
        return self.per_s / self.ceiling_per_s


@dataclasses.dataclass(slots=True, kw_only=True)
class Report:
    """Counters since the engine was loaded, or between two reports (`since`).

    Seconds are wall clock. `weights_fetched_s` is how long reading and copying weights took, beside
    compute or not; `weights_waited_s` is the part of `sweep_s` in which compute waited for them, and
    `products_s` on a CPU the part that products took, making weights ready among them.
    `totals` and `idle_s` are the timeline's; `peak_bytes` are since the process began.
    """

    policy_reason: str
    gemm_reason: str = ""
    """Which kernel multiplies, by how many rows there are."""
    ceilings: Ceilings | None = None
    num_sweeps: int = 0
    sweep_s: float = 0.0
    prompt_tokens: int = 0
    """Prompt tokens computed; those of preempted rows count each time."""
    generated_tokens: int = 0
    completions: int = 0
    preempted_rows: int = 0
    shared_tokens: int = 0
    """Prompt tokens that were not computed: another row had them, or has computed them for all."""
    weights_streamed_bytes: int = 0
    weights_fetched_s: float = 0.0
    weights_waited_s: float = 0.0
    products_s: float = 0.0
    sweeps_by_rows: dict[int, int] = dataclasses.field(default_factory=dict)
    """How many sweeps carried so many rows."""
    totals: Mapping[Track, Total] = dataclasses.field(default_factory=dict)
    idle_s: Mapping[Track, float] = dataclasses.field(default_factory=dict)
    peak_bytes: Mapping[Tier, int] = dataclasses.field(default_factory=dict)

    def since(self, earlier: "Report") -> "Report":
        """What this report has beyond an earlier one of the same engine; peak bytes stay its own."""
        by_rows = {
            rows: count
            for rows, total in self.sweeps_by_rows.items()
            if (count := total - earlier.sweeps_by_rows.get(rows, 0))
        }
        counters = {
            field.name: getattr(self, field.name) - getattr(earlier, field.name)
            for field in dataclasses.fields(self)
            if field.type in (int, float)
        }
        return dataclasses.replace(
            self,
            **counters,
            sweeps_by_rows=by_rows,
            totals={
                track: total.since(earlier.totals.get(track, Total()))
                for track, total in self.totals.items()
            },
            idle_s={
                link: seconds - earlier.idle_s.get(link, 0.0)
                for link, seconds in self.idle_s.items()
            },
        )

    @property
    def peak_rows(self) -> int:
        return max(self.sweeps_by_rows, default=0)

    @property
    def mean_rows(self) -> float:
        carried = sum(rows * count for rows, count in self.sweeps_by_rows.items())
        return carried / (self.num_sweeps or 1)

    @property
    def compute_s(self) -> float:
        return sum(self._total(track).covered_s for track in COMPUTE)

    @property
    def bottleneck(self) -> Track | None:
        """The link that weights kept busy longest; None if nothing is streamed."""
        link = max(WEIGHT_LINKS, key=lambda track: self._total(track).covered_s)
        return link if self._total(link).num_spans else None

    @property
    def io_s(self) -> float:
        """Wall seconds in which the bottleneck was busy."""
        return self._total(self.bottleneck).covered_s if self.bottleneck else 0.0

    @property
    def hidden_io_share(self) -> float | None:
        """The share of weight I/O time in which compute did not wait for it."""
        if not self.weights_fetched_s:
            return None
        return _clipped(1 - self.weights_waited_s / self.weights_fetched_s)

    @property
    def hidden_compute_share(self) -> float | None:
        """The share of compute time that did not make sweeps longer than their I/O alone."""
        if not self.bottleneck or not self.compute_s:
            return None
        return _clipped(1 - (self.sweep_s - self.io_s) / self.compute_s)

    @property
    def bubbles_s(self) -> float:
        """Sweep time in which neither compute nor the bottleneck was busy."""
        return self.idle_s.get(self.bottleneck or WEIGHT_LINKS[0], 0.0)

    @property
    def flops(self) -> int:
        return sum(self._total(track).flops for track in _IN_FLOPS)

    @property
    def roofline_s(self) -> float | None:
        """What the sweeps would have taken at the measured ceilings: the slowest of links and GEMM."""
        if self.ceilings is None:
            return None
        ceilings = self.ceilings
        links = [
            self._total(link).num_bytes / rate
            for link in WEIGHT_LINKS
            if (rate := ceilings.of(link)) is not None
        ]
        return max(self.flops / ceilings.gemm_flops_per_s, *links, 0.0)

    @property
    def roofline_share(self) -> float | None:
        if self.roofline_s is None or not self.sweep_s:
            return None
        return self.roofline_s / self.sweep_s

    def lines(self) -> list[Line]:
        """One for each track on which anything was done."""
        return [self._line(track) for track in _TOLD_TRACKS if self._total(track).num_spans]

    def as_dict(self) -> dict[str, Any]:
        """Flat, of plain JSON values; what could not be measured is left out."""
        told = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.type in (int, float, str)
        }
        told |= {
            "peak_rows": self.peak_rows,
            "rows_per_sweep": self.mean_rows,
            "generated_tokens_per_s": self.generated_tokens / (self.sweep_s or 1),
            "compute_s": self.compute_s,
            "io_s": self.io_s,
            "bubbles_s": self.bubbles_s,
            "hidden_io_share": self.hidden_io_share,
            "hidden_compute_share": self.hidden_compute_share,
            "roofline_s": self.roofline_s,
            "roofline_share": self.roofline_share,
        }
        told |= {f"peak_{tier}_bytes": peak for tier, peak in self.peak_bytes.items()}
        for line in self.lines():
            told |= _told_line(line)
        return {name: _rounded(value) for name, value in told.items() if value is not None}

    def _total(self, track: Track) -> Total:
        return self.totals.get(track, Total())

    def _line(self, track: Track) -> Line:
        total = self._total(track)
        unit, amount = "", 0
        if track in _IN_FLOPS:
            unit, amount = "FLOP", total.flops
        elif total.num_bytes:
            unit, amount = "bytes", total.num_bytes
        return Line(
            name=str(track),
            unit=unit,
            amount=amount,
            busy_s=total.covered_s,
            ceiling_per_s=self.ceilings.of(track) if self.ceilings else None,
        )


def _told_line(line: Line) -> dict[str, Any]:
    name = line.name.lower().replace(" ", "_")
    told: dict[str, Any] = {f"{name}_s": line.busy_s}
    if line.unit:
        unit = line.unit.lower()
        told |= {
            f"{name}_{unit}": line.amount,
            f"{name}_{unit}_per_s": line.per_s,
            f"{name}_ceiling_{unit}_per_s": line.ceiling_per_s,
            f"{name}_share": line.share,
        }
    return told


def _clipped(share: float) -> float:
    return min(1.0, max(0.0, share))


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value) if abs(value) >= 1e6 else round(value, 4)
