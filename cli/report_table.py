"""The engine's report for a person: link by link, achieved beside what this machine could."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from cli.amounts import amount

if TYPE_CHECKING:  # slow to import
    from worker.model import EngineReport, ReportLine

_SHARES: Final = (
    ("hidden_io_share", "of weight I/O hidden behind compute"),
    ("hidden_compute_share", "of compute hidden behind I/O"),
    ("roofline_share", "of the roofline"),
)


def report_table(report: "EngineReport") -> Table:
    """One row a link or unit; an empty cell is what was not measured."""
    table = Table(box=None, pad_edge=False)  # 80 columns hold it so
    table.add_column("", no_wrap=True)
    for heading in ("done", "busy", "rate", "ceiling", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in report.lines():
        table.add_row(line.name, *_cells(line))
    return table


def report_text(told: Mapping[str, Any]) -> str:
    """The sums in a sentence or two; `told` is the report's `as_dict`."""
    shares = [f"{told[name]:.0%} {what}" for name, what in _SHARES if name in told]
    peaks = [
        f"{amount(told[f'peak_{tier}_bytes'])}B {where}"
        for tier, where in (("gpu", "GPU memory"), ("cpu", "host memory"), ("disk", "disk"))
        if told.get(f"peak_{tier}_bytes")
    ]
    sweeps = (
        f"{told['num_sweeps']} sweeps in {told['sweep_s']:.1f} s, "
        f"{told['rows_per_sweep']:.1f} rows in each and {told['peak_rows']} at most; "
        f"{told['preempted_rows']} preempted"
    )
    tokens = (
        f"{told['prompt_tokens']} prompt and {told['generated_tokens']} generated tokens, "
        f"{told['generated_tokens_per_s']:.1f} generated a second"
    )
    lines = [sweeps, tokens, ", ".join([*shares, f"{told['bubbles_s']:.1f} s of bubbles"])]
    if peaks:
        lines.append(f"at most {', '.join(peaks)}")
    return "\n".join(f"  {line}" for line in lines)


def _cells(line: "ReportLine") -> tuple[str, ...]:
    unit = {"bytes": "B", "FLOP": "FLOP"}.get(line.unit, "")

    def told(value: float | None, per: str = "") -> str:
        return f"{amount(value)}{unit}{per}" if unit and value is not None else ""

    return (
        told(line.amount),
        f"{line.busy_s:.2f} s",
        told(line.per_s, "/s"),
        told(line.ceiling_per_s, "/s"),
        "" if line.share is None else f"{line.share:.0%}",
    )
