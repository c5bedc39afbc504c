"""What the offloading benchmark makes of its outcomes: ceilings, medians and a table. No processes."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.contenders import FREIGHT
from bench.runner import Ending, Outcome


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Rates of the machine, and what a token costs."""

    disk_bytes_per_s: float
    flops_per_s: float
    bfloat16_flops_per_s: float
    layer_parameters: int
    head_parameters: int

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Ceilings":
        return cls(
            disk_bytes_per_s=found["disk_bytes_per_s"],
            flops_per_s=max(found["linear_flops_per_s"], found["onednn_flops_per_s"]),
            bfloat16_flops_per_s=found["bfloat16_flops_per_s"],
            layer_parameters=found["layer_parameters"],
            head_parameters=found["head_parameters"],
        )

    def floor_s(self, detail: Mapping[str, Any]) -> float:
        """The least seconds for Freight's sweeps: of each the longer of reading and multiplying.

        Attention is left out: at these lengths it is about a hundredth.
        """
        sweeps: list[dict[str, int]] = detail["sweeps"]
        streamed_bytes: int = detail["streamed_bytes"]
        reading_s = streamed_bytes / max(1, len(sweeps)) / self.disk_bytes_per_s
        return sum(max(reading_s, self._multiplying_s(sweep)) for sweep in sweeps)

    def _multiplying_s(self, sweep: Mapping[str, int]) -> float:
        through_layers = sweep["prompt_tokens"] + sweep["decoded_tokens"]
        flops = (
            self.layer_parameters * through_layers + self.head_parameters * sweep["sampled_rows"]
        )
        return 2 * flops / self.flops_per_s


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
        return result.output_tokens / self.ceilings.floor_s(result.detail)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the answers."""
        fields = dataclasses.asdict(self)
        for result in fields["outcome"]["results"]:
            del result["answers"]
        return fields | {"roofline_tokens_per_s": self.roofline_tokens_per_s}


def table(rows: Sequence[Row]) -> str:
    """Of one memory ratio and workload: a line for each leg, Freight's first."""
    names = dict.fromkeys(row.outcome.leg.name for row in rows)
    freight = [row for row in rows if row.outcome.leg.engine == FREIGHT]
    ours = _median(freight, _rate)
    roofline = _median(freight, lambda row: row.roofline_tokens_per_s)
    titles = (
        "output tok/s (min-max) | total tok/s | share of the roofline | MB read per output token"
    )
    lines = [f"| | {titles} | peak GiB | loading s | Freight is |", "|" + 8 * "---|"]
    lines += [
        _line(name, [row for row in rows if row.outcome.leg.name == name], ours, roofline)
        for name in names
    ]
    if roofline is not None:
        lines.append(f"| roofline of Freight's sweeps | {roofline:.2f} | | | | | | |")
    return "\n".join([*lines, *_verdicts(rows, ours)])


def _verdicts(rows: Sequence[Row], ours: float | None) -> list[str]:
    """Freight beside the best setting of each engine."""
    verdicts = []
    for engine in dict.fromkeys(row.outcome.leg.engine for row in rows):
        names = {row.outcome.leg.name for row in rows if row.outcome.leg.engine == engine}
        medians = (
            _median([r for r in rows if r.outcome.leg.name == name], _rate) for name in names
        )
        best = max((rate for rate in medians if rate is not None), default=None)
        if ours and best and engine != FREIGHT:
            verdicts.append(f"Freight is {ours / best:.2f} times as fast as {engine} at its best.")
    return ["", *verdicts]


def _rate(row: Row) -> float | None:
    return row.outcome.output_tokens_per_s


def _line(name: str, rows: Sequence[Row], ours: float | None, roofline: float | None) -> str:
    rates = [rate for row in rows if (rate := row.outcome.output_tokens_per_s) is not None]
    last = rows[-1].outcome
    cells = [name]
    if not rates:
        bound = last.bound_tokens_per_s
        said = f"under {bound:.2f} ({last.ending})" if bound else str(last.ending)
        over = f"over {ours / bound:.2f} x" if ours and bound else ""
        return f"| {name} | {said} | | | | {_gib(last.peak_bytes)} | | {over} |"
    middle = statistics.median(rates)
    cut = " (in part)" if any(row.outcome.ending is Ending.CUT_SHORT for row in rows) else ""
    cells.append(f"{middle:.2f} ({min(rates):.2f}-{max(rates):.2f}){cut}")
    results = [r for row in rows if (r := row.outcome.result) is not None and r.seconds]
    cells.append(f"{statistics.median(r.total_tokens / r.seconds for r in results):.1f}")
    cells.append(f"{middle / roofline:.0%}" if roofline else "")
    read = statistics.median(r.read_bytes / max(1, r.output_tokens) for r in results)
    cells.append(f"{read / 1e6:.1f}")
    cells.append(_gib(max((row.outcome.peak_bytes or 0 for row in rows), default=None)))
    cells.append(f"{statistics.median(r.load_s for r in results):.1f}")
    cells.append(f"{ours / middle:.2f} x" if ours and last.leg.engine != FREIGHT else "")
    if last.ending not in {Ending.DONE, Ending.CUT_SHORT}:
        cells[1] += f", then {last.ending}"
    return f"| {' | '.join(cells)} |"


def _gib(num_bytes: int | None) -> str:
    return f"{num_bytes / 2**30:.2f}" if num_bytes else ""


def _median(rows: Sequence[Row], figure: Callable[[Row], float | None]) -> float | None:
    found = [value for row in rows if (value := figure(row)) is not None]
    return statistics.median(found) if found else None
