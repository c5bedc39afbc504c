"""Child processes kept alive: started, watched, restarted, stopped in order; not what they do.

A child that dies is started again, each time after a longer pause. Two deaths end everything, of
children that never did their work: exit status EX_CONFIG, since the same settings would only fail
again, and a child that never stood for `_STEADY_S`, over and over. One that has worked may find its
memory or its disk taken when it starts again, and they may be free later. Children are tethered
(cli/tether.py): use it from one lasting thread.
"""

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from cli.errors import StartError
from cli.tether import tethered

POLL_S: Final = 0.1
_STEADY_S: Final = 10.0
_MOST_EARLY_DEATHS: Final = 5
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 30.0
_COLD_STOP_LIMIT_S: Final = 3.0
_TAIL_LINES: Final = 20
ERROR_PREFIX: Final = "error: "


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One child: its command, and whether the process of that id does its work yet."""

    name: str
    command: tuple[str, ...]
    is_ready: Callable[[int], bool]
    stop_limit_s: float = 10.0


class _Child:
    """One role's process through its deaths."""

    def __init__(self, role: Role, *, environment: Mapping[str, str], log: Path) -> None:
        self.role = role
        self.log = log
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._restart_s = 0.0
        self._num_early_deaths = 0
        self._was_steady = False
        self._was_ready = False

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603
                tethered(self.role.command),
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the supervisor, which keeps the order
            )
        self._started_s = time.monotonic()

    def is_ready(self) -> bool:
        if self._process is None or not self.role.is_ready(self._process.pid):
            return False
        self._was_ready = True
        return True

    def check(self) -> str | None:
        """Restart the process if it died and its pause is over; news for the person, if any."""
        now_s = time.monotonic()
        if self._process is None:
            if now_s >= self._restart_s:
                self.start()
            return None
        status = self._process.poll()
        if status is None:
            if now_s - self._started_s >= _STEADY_S:
                self._num_early_deaths, self._was_steady = 0, True
            return None
        return self._plan_restart(status, now_s)

    def _plan_restart(self, status: int, now_s: float) -> str:
        self._process = None
        self._num_early_deaths += 1
        how = f"{self.role.name} died ({describe_end(status)})"
        never_stood = not self._was_steady and self._num_early_deaths >= _MOST_EARLY_DEATHS
        if status == os.EX_CONFIG and not self._was_ready:
            raise StartError(f"{self.role.name}: {_message(self.log)}")
        if never_stood:
            raise StartError(f"{how} at each of {_MOST_EARLY_DEATHS} starts\n{_message(self.log)}")
        pause_s = min(_FIRST_PAUSE_S * 2 ** (self._num_early_deaths - 1), _LONGEST_PAUSE_S)
        self._restart_s = now_s + pause_s
        return f"{how}; starting it again in {pause_s:g} s (log: {self.log})"

    def stop(self) -> None:
        """Ask, ask again (RQ takes the second for "now"), and then do not ask."""
        if self._process is None:
            return
        for limit_s in (self.role.stop_limit_s, _COLD_STOP_LIMIT_S):
            self._process.terminate()
            try:
                self._process.wait(limit_s)
            except subprocess.TimeoutExpired:
                continue
            break
        else:
            self._process.kill()
            self._process.wait()
        self._process = None


class Supervisor:
    """Owns the children from `start` to `stop`; `report` gets each line of news.

    `beside` are looked at before them: whoever keeps alive what the children need.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        *,
        environment: Mapping[str, str],
        logs_dir: Path,
        report: Callable[[str], None],
        beside: Sequence[Callable[[], str | None]] = (),
    ) -> None:
        logs_dir.mkdir(parents=True, exist_ok=True)
        self._report = report
        self._beside = beside
        self._children = [
            _Child(role, environment=environment, log=_fresh_log(logs_dir, role.name))
            for role in roles
        ]

    def start(self) -> None:
        for child in self._children:
            child.start()

    def await_ready(self) -> None:
        """Wait until every child does its work. A checkpoint may take long, so without a limit."""
        started_s = time.monotonic()
        waiting = list(self._children)
        while waiting:
            self.check()
            for child in [child for child in waiting if child.is_ready()]:
                self._report(f"{child.role.name} is up ({time.monotonic() - started_s:.1f} s)")
                waiting.remove(child)
            time.sleep(POLL_S)

    def check(self) -> None:
        """Look at everything once. Raises StartError where a restart would not help."""
        for check in (*self._beside, *(child.check for child in self._children)):
            news = check()
            if news is not None:
                self._report(news)

    def stop(self) -> None:
        for child in self._children:
            child.stop()


def describe_end(status: int) -> str:
    """How a process of that `returncode` ended."""
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def _fresh_log(logs_dir: Path, name: str) -> Path:
    log = logs_dir / f"{name}.log"
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    log.touch()
    return log


def _message(log: Path) -> str:
    """The child's own last word, if it had one, else the tail of its log."""
    lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    starts = [at for at, line in enumerate(lines) if line.startswith(ERROR_PREFIX)]
    if starts:
        return "\n".join(lines[starts[-1] :]).removeprefix(ERROR_PREFIX)
    return "\n".join([f"the end of {log}:", *lines])
