"""Fixtures of more than one suite."""

from pathlib import Path

import pytest

DEMO_MODEL = Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's file. Its absence is an error, not a skip: `make model` fetches it."""
    if not DEMO_MODEL.is_file():
        raise FileNotFoundError(f"{DEMO_MODEL} is missing: run `make model`")
    return DEMO_MODEL
