"""A Redis that cannot be used is told by its address, at once, and never with its password."""

import socket
import time
from collections.abc import Iterator

import pytest

from cli.errors import StartError
from cli.presence import require_redis


@pytest.fixture
def port() -> Iterator[int]:
    """Bound and not listening: nobody answers here."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield int(unused.getsockname()[1])


def test_a_redis_that_answers_is_taken(valkey_url: str) -> None:
    require_redis(valkey_url)


def test_an_address_where_nobody_answers_is_named_at_once(port: int) -> None:
    started_s = time.monotonic()
    with pytest.raises(StartError, match=f"no Redis answers at 127.0.0.1:{port}") as caught:
        require_redis(f"redis://:secret@127.0.0.1:{port}/0")
    assert "secret" not in str(caught.value)
    assert time.monotonic() - started_s < 5


def test_a_socket_that_is_not_there_is_named() -> None:
    with pytest.raises(StartError, match="no Redis answers at /nowhere/socket"):
        require_redis("unix:///nowhere/socket")


@pytest.mark.parametrize("url", ["127.0.0.1:6379", "redis://:sec/ret@127.0.0.1:6379/0", "http://x"])
def test_what_is_no_address_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(StartError, match="FREIGHT_REDIS_URL") as caught:
        require_redis(url)
    assert "sec" not in str(caught.value)
