"""Run one role with the fake engine: `python -m tests.support.roles intake|worker '{...}'`."""

import json
import sys
from pathlib import Path
from typing import Any

from jobs.settings import Settings
from tests.support.fake_engine import FakeEngine, FakeTokenizer
from worker.main import run_intake, run_worker
from worker.model import Loaded


def main(role: str, options: dict[str, Any]) -> None:
    settings = Settings.from_environment()
    if role == "intake":
        run_intake(settings, load_tokenizer=lambda _: FakeTokenizer())
        return
    witness = Path(options.pop("witness"))
    run_worker(
        settings,
        load_engine=lambda *_: Loaded(engine=FakeEngine(witness=witness, **options)),
        load_tokenizer=lambda _: FakeTokenizer(),
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
