"""Run one role with the fake engine: `python -m tests.support.roles intake|worker '{...}'`.

With `is_real` it is the role as it is, with the model of its settings.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.sweep.report import Report
from jobs.line_group import WaitingBatch
from jobs.settings import Settings
from tests.support.fake_engine import FakeEngine, FakeTokenizer
from worker.main import run_intake, run_worker
from worker.model import Loaded


def main(role: str, options: dict[str, Any]) -> None:
    settings = Settings.from_environment()
    if options.pop("is_real", False):
        {"intake": run_intake, "worker": run_worker}[role](settings)
        return
    if role == "intake":
        run_intake(settings, load_tokenizer=lambda _: FakeTokenizer())
        return
    witness = Path(options.pop("witness"))
    loads_left = iter(range(int(options.pop("num_reloads", 0))))

    def load_engine(_: Settings, waiting: Sequence[WaitingBatch]) -> Loaded:
        engine = FakeEngine(witness=witness, **options)
        return Loaded(engine=engine, replanner=_Restless(next(loads_left, None) is not None))

    run_worker(settings, load_engine=load_engine, load_tokenizer=lambda _: FakeTokenizer())


class _Restless:
    """Wants another load as soon as anything waits, or never; predicts nothing."""

    def __init__(self, wants_load: bool) -> None:  # noqa: FBT001
        self._wants_load = wants_load

    predicted_tokens_per_s = None

    def consider(self, waiting: Sequence[WaitingBatch]) -> bool:
        return self._wants_load and bool(waiting)

    def settle(self, report: object) -> Mapping[str, Any] | None:
        return {"num_sweeps": report.num_sweeps} if isinstance(report, Report) else None


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
