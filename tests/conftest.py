"""Fixtures of more than one suite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.box import Box
from tests.support.valkey import running_valkey
from worker.context import IntakeContext

DEMO_MODEL = Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


# A slow machine is no fault of the code under test.
settings.register_profile("freight", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("freight")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's file. Its absence is an error, not a skip: `make model` fetches it."""
    if not DEMO_MODEL.is_file():
        raise FileNotFoundError(f"{DEMO_MODEL} is missing: run `make model`")
    return DEMO_MODEL


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """A real Valkey for the whole session; what a test leaves there, the next one finds."""
    with running_valkey() as url:
        yield url


@pytest.fixture
def box(tmp_path: Path, valkey_url: str) -> Iterator[Box]:
    """An installation of one test's own, on an empty Redis; the test starts and kills its roles."""
    box = Box(tmp_path, valkey_url)
    box.redis.flushall()
    yield box
    box.close()


@pytest.fixture
def context(box: Box) -> IntakeContext:
    return box.intake_context()
