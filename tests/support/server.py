"""Runs the application on a loopback port of its own, in a thread of the test's process."""

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from redis import Redis
from starlette.types import ASGIApp

from jobs.ledger.ledger import Ledger
from jobs.stores.base import FileStore
from server.connection import connection_class
from server.stopping import Server

_START_LIMIT_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The server under test, and a view of what it keeps."""

    url: str
    ledger: Ledger
    files: FileStore
    redis: Redis
    state_dir: Path

    def blobs(self) -> list[str]:
        """Everything in the store's folder, temporary files too."""
        return sorted(path.name for path in (self.state_dir / "files").iterdir())


class _Server(Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@contextlib.contextmanager
def serving(app: ASGIApp, *, stall_s: float = 60.0, port: int = 0) -> Iterator[str]:
    """Yield the address, `http://127.0.0.1:<port>`, of the running application; 0: any port."""
    config = uvicorn.Config(
        app,
        http=connection_class(stall_s),
        log_level="critical",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
    )
    server = _Server(config)
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            if not server.is_up.wait(_START_LIMIT_S):
                raise TimeoutError(f"the server did not start within {_START_LIMIT_S:g} s")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_START_LIMIT_S)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
