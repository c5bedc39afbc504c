"""A server alone for what it answers by itself, and a whole installation for what it does."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import structlog
from openai import OpenAI
from redis import Redis

from jobs.ledger.ledger import Ledger, Model
from jobs.networks import Networks
from jobs.settings import Settings
from jobs.stores import STORES
from server.app import create_app
from tests.support.box import Box
from tests.support.server import Running, serving
from tests.support.service import Service
from tests.support.tenants import Tenants
from tests.support.valkey import running_valkey
from tests.support.wire import request_lines


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Log lines of a server that outlives a test would land in another's output."""
    level = logging.CRITICAL
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))


@pytest.fixture(scope="session")
def contract_redis_url() -> Iterator[str]:
    """Not the other suites': they empty theirs."""
    with running_valkey() as url:
        yield url


@contextlib.contextmanager
def server_alone(folder: Path, redis_url: str) -> Iterator[Running]:
    settings = Settings(state_dir=folder, redis_url=f"{redis_url}?db=1", max_file_bytes=100_000)
    with serving(create_app(settings)) as url, Redis.from_url(redis_url) as redis:
        ledger = Ledger.open(settings.ledger_url)
        ledger.models.serve(Model(id="org/name", created_at=5, max_context_tokens=64))
        files = STORES["folder"].open(settings.files_dir)
        yield Running(url=url, ledger=ledger, files=files, redis=redis, state_dir=folder)
        ledger.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, contract_redis_url: str) -> Iterator[Running]:
    """A server without workers, shared by a module: a new batch stays `validating`."""
    with server_alone(tmp_path_factory.mktemp("server"), contract_redis_url) as running:
        yield running


@pytest.fixture
def fresh(tmp_path: Path, contract_redis_url: str) -> Iterator[Running]:
    """One of a test's own, that nobody used before."""
    with server_alone(tmp_path, contract_redis_url) as running:
        yield running


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[OpenAI]:
    with strict_client(running.url) as client:
        yield client


@pytest.fixture
def fresh_client(fresh: Running) -> Iterator[OpenAI]:
    with strict_client(fresh.url) as client:
        yield client


def strict_client(url: str, api_key: str = "any") -> OpenAI:
    """The official client: an answer that is not of the documented shape raises."""
    return OpenAI(base_url=f"{url}/v1", api_key=api_key, _strict_response_validation=True)


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory, contract_redis_url: str) -> Iterator[Tenants]:
    """A server that asks for keys, shared by a module."""
    with (
        server_alone(tmp_path_factory.mktemp("tenants"), contract_redis_url) as running,
        contextlib.closing(Tenants(running)) as tenants,
    ):
        yield tenants


@pytest.fixture(scope="module")
def http(running: Running) -> Iterator[httpx2.Client]:
    """A plain client, for what the official one would never send."""
    with httpx2.Client(base_url=running.url) as client:
        yield client


@pytest.fixture(scope="module")
def lines() -> bytes:
    return request_lines(3)


@pytest.fixture(scope="module")
def file_id(client: OpenAI, lines: bytes) -> str:
    return client.files.create(file=lines, purpose="batch").id


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, contract_redis_url: str) -> Iterator[Service]:
    """Shared by all tests of a session: none may stop or starve it."""
    box = Box(
        tmp_path_factory.mktemp("service"),
        contract_redis_url,
        webhook_networks=Networks("127.0.0.0/8"),
    )
    with (
        serving(create_app(box.settings)) as url,
        box.running("intake"),
        box.running("worker", sweep_s=0.01),
        strict_client(url) as client,
    ):
        box.until(lambda: box.redis.scard("rq:workers") == 2, seconds=60)
        yield Service(url=url, client=client, box=box)
    box.close()
