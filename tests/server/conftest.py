"""A running server over its own ledger and store, and clients of it."""

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import structlog
from openai import OpenAI
from redis import Redis

from jobs.ledger.ledger import Ledger
from jobs.settings import Settings
from jobs.stores import STORES
from server.app import create_app
from tests.support.server import Running, serving
from tests.support.wire import request_lines


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Log lines of a server that outlives a test would land in another's output."""
    level = logging.CRITICAL
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))


@pytest.fixture
def running(tmp_path: Path, valkey_url: str) -> Iterator[Running]:
    settings = Settings(state_dir=tmp_path, redis_url=valkey_url, max_file_bytes=100_000)
    with serving(create_app(settings)) as url, Redis.from_url(valkey_url) as redis:
        redis.flushall()
        ledger = Ledger.open(settings.ledger_url)
        files = STORES["folder"].open(settings.files_dir)
        yield Running(url=url, ledger=ledger, files=files, redis=redis, state_dir=tmp_path)
        ledger.close()


@pytest.fixture
def client(running: Running) -> Iterator[OpenAI]:
    """The official client, strict: an answer that is not of the documented shape raises."""
    with OpenAI(
        base_url=f"{running.url}/v1", api_key="any", _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
def http(running: Running) -> Iterator[httpx2.Client]:
    """A plain client, for what the official one would never send."""
    with httpx2.Client(base_url=running.url) as client:
        yield client


@pytest.fixture
def lines() -> bytes:
    return request_lines(3)
