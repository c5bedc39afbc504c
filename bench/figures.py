"""What the offloading benchmark makes of its outcomes: ceilings, medians and a table. No processes."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.contenders import FREIGHT
from bench.runner import Ending, Leg, Outcome


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Rates of the machine, and what a token costs."""

    disk_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    """By the dtype that is multiplied in."""
    layer_parameters: int
    head_parameters: int

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Ceilings":
        return cls(
            disk_bytes_per_s=found["disk_bytes_per_s"],
            flops_per_s=found["flops_per_s"],
            layer_parameters=found["layer_parameters"],
            head_parameters=found["head_parameters"],
        )

    def floor_s(self, detail: Mapping[str, Any], dtype: str) -> float:
        """The least seconds for Freight's sweeps: of each the longer of reading and multiplying.

        Attention is left out: at these lengths it is about a hundredth.
        """
        sweeps: list[dict[str, int]] = detail["sweeps"]
        streamed_bytes: int = detail["streamed_bytes"]
        reading_s = streamed_bytes / max(1, len(sweeps)) / self.disk_bytes_per_s
        rate = self.flops_per_s[dtype]
        return sum(max(reading_s, self._flops(sweep) / rate) for sweep in sweeps)

    def _flops(self, sweep: Mapping[str, int]) -> float:
        through_layers = sweep["prompt_tokens"] + sweep["decoded_tokens"]
        flops = (
            self.layer_parameters * through_layers + self.head_parameters * sweep["sampled_rows"]
        )
        return 2 * flops


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One outcome in its place: memory ratio, workload, repetition."""

    ratio: float
    workload: str
    repetition: int
    ceilings: Ceilings
    outcome: Outcome

    @property
    def roofline_tokens_per_s(self) -> float | None:
        """For a row of Freight's."""
        result = self.outcome.result
        if result is None or "sweeps" not in result.detail:
            return None
        dtype = self.outcome.leg.options["dtype"]
        return result.output_tokens / self.ceilings.floor_s(result.detail, dtype)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the answers."""
        fields = dataclasses.asdict(self)
        for result in fields["outcome"]["results"]:
            del result["answers"]
        return fields | {"roofline_tokens_per_s": self.roofline_tokens_per_s}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ours:
    """One of Freight's legs, which all others are put beside; None where there is no figure."""

    name: str
    dtype: str
    rate: float | None
    roofline: float | None


def table(rows: Sequence[Row]) -> str:
    """Of one memory ratio and workload: a line for each leg, Freight's first.

    The share is of the roofline of Freight's leg in the same dtype, or of its first leg.
    """
    names = dict.fromkeys(row.outcome.leg.name for row in rows)
    ours = _ours(rows)
    titles = (
        "output tok/s (min-max) | total tok/s | share of the roofline | MB read per output token"
    )
    compared = "".join(f" {each.name} is |" for each in ours)
    lines = [
        f"| | {titles} | peak GiB | loading s |{compared}",
        "|" + (7 + len(ours)) * "---|",
    ]
    lines += [_line(name, [r for r in rows if r.outcome.leg.name == name], ours) for name in names]
    lines += [
        f"| roofline of the sweeps of {each.name} | {each.roofline:.2f} | | | | | |"
        + len(ours) * " |"
        for each in ours
        if each.roofline is not None
    ]
    return "\n".join([*lines, *_verdicts(rows, ours)])


def _ours(rows: Sequence[Row]) -> list[Ours]:
    legs = {row.outcome.leg.name: row.outcome.leg for row in rows}
    found = []
    for name, leg in legs.items():
        if leg.engine == FREIGHT:
            own = [row for row in rows if row.outcome.leg.name == name]
            rate, roofline = _median(own, _rate), _median(own, lambda r: r.roofline_tokens_per_s)
            found.append(Ours(name=name, dtype=leg.options["dtype"], rate=rate, roofline=roofline))
    return found


def _verdicts(rows: Sequence[Row], ours: Sequence[Ours]) -> list[str]:
    """Each of Freight's legs beside the best setting of each engine."""
    verdicts = []
    for engine in dict.fromkeys(row.outcome.leg.engine for row in rows):
        names = {row.outcome.leg.name for row in rows if row.outcome.leg.engine == engine}
        medians = (
            _median([r for r in rows if r.outcome.leg.name == name], _rate) for name in names
        )
        best = max((rate for rate in medians if rate is not None), default=None)
        verdicts += [
            f"{each.name} is {each.rate / best:.2f} times as fast as {engine} at its best."
            for each in ours
            if each.rate and best and engine != FREIGHT
        ]
    return ["", *verdicts]


def _roofline_beside(leg: Leg, ours: Sequence[Ours]) -> float | None:
    same = [each for each in ours if each.dtype == leg.options.get("dtype")]
    return next((each.roofline for each in (*same, *ours)), None)


def _rate(row: Row) -> float | None:
    return row.outcome.output_tokens_per_s


def _line(name: str, rows: Sequence[Row], ours: Sequence[Ours]) -> str:
    rates = [rate for row in rows if (rate := row.outcome.output_tokens_per_s) is not None]
    last = rows[-1].outcome
    if not rates:
        bound = last.bound_tokens_per_s
        said = f"under {bound:.2f} ({last.ending})" if bound else str(last.ending)
        over = [f"over {each.rate / bound:.2f} x" if each.rate and bound else "" for each in ours]
        return f"| {' | '.join([name, said, '', '', '', _gib(last.peak_bytes), '', *over])} |"
    middle = statistics.median(rates)
    roofline = _roofline_beside(last.leg, ours)
    results = [r for row in rows if (r := row.outcome.result) is not None and r.seconds]
    read = statistics.median(r.read_bytes / max(1, r.output_tokens) for r in results)
    cells = [
        name,
        f"{middle:.2f} ({min(rates):.2f}-{max(rates):.2f}){_endings(rows)}",
        f"{statistics.median(r.total_tokens / r.seconds for r in results):.1f}",
        f"{middle / roofline:.0%}" if roofline else "",
        f"{read / 1e6:.1f}",
        _gib(max((row.outcome.peak_bytes or 0 for row in rows), default=None)),
        f"{statistics.median(r.load_s for r in results):.1f}",
    ]
    cells += [
        f"{each.rate / middle:.2f} x" if each.rate and each.name != name else "" for each in ours
    ]
    return f"| {' | '.join(cells)} |"


def _endings(rows: Sequence[Row]) -> str:
    """What is to be said of a rate whose legs did not all come to their end."""
    cut = any(row.outcome.ending is Ending.CUT_SHORT for row in rows)
    last = rows[-1].outcome.ending
    failed = last not in {Ending.DONE, Ending.CUT_SHORT}
    return f"{' (in part)' if cut else ''}{f', then {last}' if failed else ''}"


def _gib(num_bytes: int | None) -> str:
    return f"{num_bytes / 2**30:.2f}" if num_bytes else ""


def _median(rows: Sequence[Row], figure: Callable[[Row], float | None]) -> float | None:
    found = [value for row in rows if (value := figure(row)) is not None]
    return statistics.median(found) if found else None
