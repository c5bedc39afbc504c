"""What happened when, on each link and unit of the machine; knows seconds, bytes and FLOPs only."""

import contextlib
import dataclasses
import enum
import threading
import time
from collections.abc import Iterator, Mapping


class Track(enum.StrEnum):
    """One thing that can be busy while the others are. Values are what people read."""

    DISK_READ = "disk read"
    DISK_WRITE = "disk write"
    TO_GPU = "CPU to GPU"
    TO_CPU = "GPU to CPU"
    LAYERS = "layers"  # compute of layer steps, attention included
    ATTENTION = "attention"  # the part of it beside the KV cache
    HEAD = "head"
    SAMPLING = "sampling"
    WAIT = "waiting for weights"  # compute stood still


@dataclasses.dataclass(slots=True)
class Total:
    """Sums over one track. `busy_s` counts overlapping spans of several threads each."""

    num_spans: int = 0
    busy_s: float = 0.0
    num_bytes: int = 0
    flops: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One span: seconds of `time.perf_counter`, the thread that it ran on."""

    track: Track
    name: str
    started_s: float
    ended_s: float
    num_bytes: int
    thread: str


class Timeline:
    """Totals of every track, and each single span if `keep_events`. Any thread may add to it."""

    def __init__(self, *, keep_events: bool = False) -> None:
        self._lock = threading.Lock()
        self._totals = {track: Total() for track in Track}
        self._keep_events = keep_events
        self.events: list[Event] = []

    def add(
        self,
        track: Track,
        name: str,
        *,
        started_s: float,
        ended_s: float,
        num_bytes: int = 0,
        flops: int = 0,
    ) -> None:
        with self._lock:
            total = self._totals[track]
            total.num_spans += 1
            total.busy_s += ended_s - started_s
            total.num_bytes += num_bytes
            total.flops += flops
            if self._keep_events:
                thread = threading.current_thread().name
                self.events.append(Event(track, name, started_s, ended_s, num_bytes, thread))

    @contextlib.contextmanager
    def span(
        self, track: Track, name: str, *, num_bytes: int = 0, flops: int = 0
    ) -> Iterator[None]:
        """Time the body; a body that raises is not counted."""
        started_s = time.perf_counter()
        yield
        self.add(
            track,
            name,
            started_s=started_s,
            ended_s=time.perf_counter(),
            num_bytes=num_bytes,
            flops=flops,
        )

    def totals(self) -> Mapping[Track, Total]:
        """A copy: what was added so far."""
        with self._lock:
            return {track: dataclasses.replace(total) for track, total in self._totals.items()}
