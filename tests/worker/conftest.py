"""Installations for the worker's tests; each starts on an empty Redis."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.box import Box
from worker.context import IntakeContext


@pytest.fixture
def box(tmp_path: Path, valkey_url: str) -> Iterator[Box]:
    box = Box(tmp_path, valkey_url)
    box.redis.flushall()
    yield box
    box.close()


@pytest.fixture
def context(box: Box) -> IntakeContext:
    return box.intake_context()
