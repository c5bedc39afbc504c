"""Installations for the worker's tests; each starts on an empty Redis."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.box import Box
from tests.support.fake_engine import FakeTokenizer
from worker.context import IntakeContext
from worker.model import served_model
from worker.render import Renderer


@pytest.fixture
def box(tmp_path: Path, valkey_url: str) -> Iterator[Box]:
    box = Box(tmp_path, valkey_url)
    box.redis.flushall()
    yield box
    box.close()


@pytest.fixture
def context(box: Box) -> IntakeContext:
    """What intake's tasks work with, in this process."""
    served = served_model(box.settings)
    box.ledger.models.serve(served)
    return IntakeContext(
        settings=box.settings,
        ledger=box.ledger,
        store=box.store,
        doorbell=box.doorbell,
        renderer=Renderer(tokenizer=FakeTokenizer(), max_context_tokens=served.max_context_tokens),
        model_id=served.id,
    )
