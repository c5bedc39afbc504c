"""A timeline as a file for Chrome's tracing and Perfetto: written as it happens, bounded in bytes.

Knows the trace event format (the array of it, whose closing bracket may be missing: viewers take a
file that was cut off by a kill); not what the spans mean.
"""

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any, Final

from engine.timeline import Event, Track

_MAX_BYTES: Final = 256 * 2**20
_BUFFER_BYTES: Final = 64 * 2**10
_ORDER: Final = {track: place for place, track in enumerate(Track)}


class ChromeTrace:
    """One "X" event a span, on one row a thread and track; one "C" event a counted quantity.

    Whole lines go to the file, at every `flush` at least: after a kill all of them can be read.
    A file that is there already is written over. Raises OSError if it cannot be opened; where
    writing fails later, the trace ends there with a warning and what is traced goes on.
    """

    def __init__(self, path: Path, *, max_bytes: int = _MAX_BYTES) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._is_full = False
        self._buffer: list[bytes] = [b"[\n"]
        self._buffered_bytes = 0
        self._pid = os.getpid()
        self._origin_s = time.perf_counter()
        self._rows: dict[tuple[str, Track], int] = {}
        # The one event without a comma before it.
        self._put(self._about("process_name", 0, name="freight"), separator=b"")
        self._put(self._about("process_labels", 0, labels=f"begun at {time.time():.3f} s"))

    def span(self, event: Event) -> None:
        amounts = {"bytes": event.num_bytes, "flops": event.flops}
        self._put(
            {
                "name": event.name,
                "cat": str(event.track),
                "ph": "X",
                "ts": self._micros(event.started_s),
                "dur": round(1e6 * (event.ended_s - event.started_s), 3),
                "pid": self._pid,
                "tid": self._row(event.thread, event.track),
                "args": {name: amount for name, amount in amounts.items() if amount},
            }
        )

    def count(self, name: str, value: int, *, at_s: float) -> None:
        self._put(
            {
                "name": name,
                "ph": "C",
                "ts": self._micros(at_s),
                "pid": self._pid,
                "tid": 0,
                "args": {name: value},
            }
        )

    def flush(self) -> None:
        if self._buffer:
            text = b"".join(self._buffer)
            self._buffer.clear()
            self._buffered_bytes = 0
            try:
                while text:
                    text = text[os.write(self._file, text) :]
            except OSError as error:
                self._is_full = True
                warnings.warn(f"the trace {self._path} ends early: {error}", stacklevel=2)

    def close(self) -> None:
        self._buffer.append(b"\n]\n")
        self.flush()
        os.close(self._file)

    def _row(self, thread: str, track: Track) -> int:
        row = self._rows.get((thread, track))
        if row is None:
            row = self._rows[thread, track] = len(self._rows) + 1
            self._put(self._about("thread_name", row, name=f"{track} ({thread})"))
            self._put(self._about("thread_sort_index", row, sort_index=_ORDER[track]))
        return row

    def _about(self, what: str, row: int, **said: Any) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": self._pid, "tid": row, "args": said}

    def _micros(self, at_s: float) -> float:
        return round(1e6 * (at_s - self._origin_s), 3)

    def _put(self, event: dict[str, Any], *, separator: bytes = b",\n") -> None:
        if self._is_full:
            return
        line = separator + json.dumps(event, separators=(",", ":")).encode()
        if self._num_bytes + len(line) > self._max_bytes:
            self._is_full = True
            note = f"the trace is full at {self._max_bytes:,} bytes: what comes later is not in it"
            full = {"name": note, "ph": "i", "s": "g", "ts": self._micros(time.perf_counter())}
            line = b",\n" + json.dumps({**full, "pid": self._pid, "tid": 0}).encode()
        self._num_bytes += len(line)
        self._buffer.append(line)
        self._buffered_bytes += len(line)
        if self._buffered_bytes >= _BUFFER_BYTES:
            self.flush()
