"""Servers as processes, and waiting for what they do, with a bound and without luck."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs.settings import Settings
from tests.support.server import free_port

_ROOT = Path(__file__).parents[2]


def wait_until(holds: Callable[[], bool], *, limit_s: float = 20.0) -> None:
    end_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


def is_running(process_id: int) -> bool:
    """False for a zombie: it only waits to be collected."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@contextlib.contextmanager
def server_process(settings: Settings) -> "Iterator[tuple[subprocess.Popen[bytes], str]]":
    """The server as `python -m server.main` on a port of its own; its process and address."""
    port = free_port()
    environment = {**os.environ, **settings.to_environment(), "FREIGHT_PORT": str(port)}
    command = [sys.executable, "-m", "server.main"]
    with subprocess.Popen(
        command, cwd=_ROOT, env=environment, stderr=subprocess.DEVNULL
    ) as process:

        def listens() -> bool:
            assert process.poll() is None, "the server ended"
            with socket.socket() as attempt:
                return attempt.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_until(listens)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def peak_memory_bytes(process_id: int) -> int:
    """The most that was resident at once."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
