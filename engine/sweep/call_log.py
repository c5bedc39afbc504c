"""The engine's call log: what it was asked and did, one JSON line each; the witness after a fault.

Each line is one write to a file opened for appending, so that it is there whatever kills the
process next, and logs of one process after another lie in one file.
"""

import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class LoggedRow(NamedTuple):
    """A row's part of a sweep: `position` is the first of its `tokens` in the row, `sample` tells
    the completions of one prompt apart.
    """

    key: str
    sample: int
    position: int
    tokens: int
    sampled: bool


class CallLog:
    """Lines for load, submit, sweep, raised, preempt, finish, cancel and close.

    Every line has `event`, `at_s` (monotonic) and `wall_s` (since the epoch). A sweep's line is
    written before it runs. Without a path nothing is written. Raises OSError if the file cannot be
    opened; where writing fails later, the log ends there with a warning and the engine goes on.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._write("load", pid=os.getpid())

    def submit(self, key: str, *, prompt_tokens: int, max_tokens: int) -> None:
        self._write("submit", key=key, prompt_tokens=prompt_tokens, max_tokens=max_tokens)

    def sweep(self, number: int, rows: Sequence[LoggedRow]) -> None:
        if self._file is not None:
            self._write("sweep", sweep=number, rows=[row._asdict() for row in rows])

    def raised(self, number: int, error: BaseException) -> None:
        """The sweep of that number did nothing: its rows are as they were before."""
        self._write("raised", sweep=number, error=type(error).__name__)

    def preempt(self, key: str, *, tokens: int) -> None:
        """`tokens` of the row, prompt and generated, will be computed again."""
        self._write("preempt", key=key, tokens=tokens)

    def finish(self, key: str, *, reason: str, tokens: int) -> None:
        """`tokens` were generated, the end-of-sequence token among them."""
        self._write("finish", key=key, reason=reason, tokens=tokens)

    def cancel(self, key: str) -> None:
        self._write("cancel", key=key)

    def close(self) -> None:
        if self._file is not None:
            self._write("close")
            os.close(self._file)
            self._file = None

    def _write(self, event: str, **fields: Any) -> None:
        if self._file is None:
            return
        times = {"at_s": round(time.monotonic(), 6), "wall_s": round(time.time(), 6)}
        line = json.dumps({"event": event, **times, **fields}, separators=(",", ":"))
        try:
            os.write(self._file, f"{line}\n".encode())
        except OSError as error:
            warnings.warn(f"the call log ends at {event!r}: {error}", stacklevel=3)
            os.close(self._file)
            self._file = None
