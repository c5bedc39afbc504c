"""One POST: to an address that was looked at, once, in time, following nothing."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import h11
import pytest

from jobs.networks import Networks
from tests.support.receiver import Receiver, receiving
from worker.http_post import AddressRefusedError, post

LOOPBACK = Networks("127.0.0.0/8")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def send(url: str, *, networks: Networks = LOOPBACK, limit_s: float = 10.0) -> int:
    return asyncio.run(
        post(url, headers={"X-A": "b"}, body=b"{}", networks=networks, limit_s=limit_s)
    )


def test_what_is_sent_arrives(receiver: Receiver) -> None:
    assert send(receiver.url) == 200
    (heard,) = receiver.heard
    assert (heard.path, heard.body, heard.headers["x-a"]) == ("/hook?of=tests", b"{}", "b")
    assert heard.headers["host"] == urlsplit(receiver.url).netloc


def test_a_name_is_asked_for_once_and_only_allowed_addresses_of_it_are_called(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def lookup(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        """Says something else each time: the first answer is what counts."""
        asked.append(host)
        addresses = ["10.255.255.1", "127.0.0.1"] if len(asked) == 1 else ["10.255.255.1"]
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert send(receiver.url.replace("127.0.0.1", "rebinding.example")) == 200
    assert asked == ["rebinding.example"]
    assert receiver.heard[0].headers["host"].startswith("rebinding.example:")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433"])
def test_no_spelling_of_a_private_address_is_called(receiver: Receiver, host: str) -> None:
    with pytest.raises(AddressRefusedError, match=host):
        send(receiver.url.replace("127.0.0.1", host), networks=Networks())
    assert receiver.heard == []


def test_a_redirect_is_an_answer_like_any_other(receiver: Receiver) -> None:
    with receiving(statuses=(302,), location=receiver.url) as first:
        assert send(first.url) == 302
    assert receiver.heard == []


def test_who_never_answers_is_left_in_time() -> None:
    with receiving(is_deaf=True) as deaf, pytest.raises(TimeoutError):
        send(deaf.url, limit_s=0.2)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"SSH-2.0-x\r\n\r\n", h11.RemoteProtocolError),
        (b"", (h11.RemoteProtocolError, OSError)),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 20_000, h11.RemoteProtocolError),
    ],
)
def test_an_answer_that_is_none_is_said_to_be_none(said: bytes, error: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            link, _ = listener.accept()
            with link:
                link.recv(65_536)
                with contextlib.suppress(OSError):  # nobody listens to nonsense to its end
                    link.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(error):
            send(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join()


def test_an_interim_answer_is_not_the_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            link, _ = listener.accept()
            with link:
                link.recv(65_536)
                link.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 202 Accepted\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert send(f"http://127.0.0.1:{listener.getsockname()[1]}/") == 202
        thread.join()
