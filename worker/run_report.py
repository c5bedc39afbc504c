"""What a busy period achieved: the engine's counters, and which batches and riders each block carried."""

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import structlog

from worker.model import EngineReport, ReportLine

log: Final = structlog.get_logger(__name__)
_MAX_REPORTS: Final = 50
_MAX_BLOCKS: Final = 1_000
RIDERS: Final = "riders"
"""What stands for all riders of a block where a batch's id does for its lines."""


@dataclasses.dataclass(slots=True, kw_only=True)
class _Carried:
    """Consecutive sweeps over rows of the same batches; `rows` holds each batch's peak."""

    num_sweeps: int
    rows: dict[str, int]


class RunReport:
    """Notes the sweeps of one busy period and writes them into `folder` at its end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begin()

    def note(
        self, rows_by_batch: Mapping[str, int], *, num_settled: int, num_riders: int = 0
    ) -> None:
        """Of lines `num_settled` and of riders `num_riders` were settled by this sweep."""
        self._num_sweeps += 1
        self._num_settled += num_settled
        self._num_riders += num_riders
        last = self._blocks[-1] if self._blocks else None
        if last is not None and last.rows.keys() == rows_by_batch.keys():
            last.num_sweeps += 1
            last.rows = {name: max(rows, last.rows[name]) for name, rows in rows_by_batch.items()}
        elif len(self._blocks) < _MAX_BLOCKS:
            self._blocks.append(_Carried(num_sweeps=1, rows=dict(rows_by_batch)))

    def close(
        self, engine_report: EngineReport, prediction: Mapping[str, Any] | None = None
    ) -> None:
        """Log and write the period, which `engine_report` is of, and begin the next. A period without
        a sweep leaves nothing, and one of riders alone is only logged: they would soon displace the
        reports of batches. `prediction` is it beside what was measured.
        """
        if self._num_sweeps:
            ended_at = _now()
            batch_ids = {name for block in self._blocks for name in block.rows} - {RIDERS}
            report = {
                "started_at": self._started_at.isoformat(),
                "ended_at": ended_at.isoformat(),
                "num_sweeps": self._num_sweeps,
                "num_settled_lines": self._num_settled,
                "num_answered_riders": self._num_riders,
                "num_batches": len(batch_ids),
                "blocks": [dataclasses.asdict(block) for block in self._blocks],
                "engine": engine_report.as_dict(),
            }
            if prediction is not None:
                report["prediction"] = dict(prediction)
            log.info("busy period", **report)
            for line in engine_report.lines():
                log.info("achieved", **_told(line))
            if batch_ids:
                self._write(f"{ended_at:%Y%m%dT%H%M%S.%f}Z.json", report)
        self._begin()

    def _begin(self) -> None:
        self._started_at = _now()
        self._num_sweeps = 0
        self._num_settled = 0
        self._num_riders = 0
        self._blocks: list[_Carried] = []

    def _write(self, name: str, report: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=2, default=str)
        (self._folder / name).write_text(f"{text}\n", encoding="utf-8")
        for old in sorted(self._folder.glob("*.json"))[:-_MAX_REPORTS]:
            old.unlink(missing_ok=True)


def _told(line: ReportLine) -> dict[str, Any]:
    told: dict[str, Any] = {"link": line.name, "busy_s": round(line.busy_s, 3)}
    if line.unit:
        told |= {"done": line.amount, "unit": line.unit}
    for name in ("per_s", "ceiling_per_s", "share"):
        if (value := getattr(line, name)) is not None:
            told[name] = round(value, 3) if name == "share" else round(value)
    return told


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
