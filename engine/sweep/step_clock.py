"""When each step of one sweep began and ended on the compute device; knows neither rows nor weights."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from engine.timeline import Timeline, Track


class _Pending(NamedTuple):
    """A span on a GPU whose times are not known yet."""

    track: Track
    name: str
    flops: int
    started: torch.cuda.Event
    ended: torch.cuda.Event


class StepClock:
    """Puts spans on the timeline: as they end on the CPU, and on a GPU, which computes later than it
    is asked to, in `settle`. Made when the device is idle; a sweep that raises just drops it.
    """

    def __init__(self, timeline: Timeline, device: torch.device) -> None:
        self._timeline = timeline
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._pending: list[_Pending] = []
        self._origin_s = time.perf_counter()
        self._origin = self._mark()

    @contextlib.contextmanager
    def span(self, track: Track, name: str, *, flops: int = 0) -> Iterator[None]:
        if self._stream is None:
            with self._timeline.span(track, name, flops=flops, but_waits=True):
                yield
            return
        started = self._mark()
        yield
        ended = self._mark()
        assert started is not None
        assert ended is not None
        self._pending.append(_Pending(track, name, flops, started, ended))

    def settle(self) -> None:
        """Wait for the last span's end, nothing else, and put all spans on the timeline."""
        if not self._pending:
            return
        self._pending[-1].ended.synchronize()
        for pending in self._pending:
            self._timeline.add(
                pending.track,
                pending.name,
                started_s=self._seconds(pending.started),
                ended_s=self._seconds(pending.ended),
                flops=pending.flops,
            )
        self._pending.clear()

    def _mark(self) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # as torch is
        event.record(self._stream)
        return event

    def _seconds(self, event: torch.cuda.Event) -> float:
        assert self._origin is not None
        elapsed_ms: float = self._origin.elapsed_time(event)
        return self._origin_s + elapsed_ms / 1e3
