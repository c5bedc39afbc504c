"""What happened when, on each link and unit of the machine; knows seconds, bytes and FLOPs only."""

import bisect
import contextlib
import dataclasses
import enum
import math
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Final, Protocol


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
    SWEEP = "sweep"
    LOADING = "loading"  # reads of what stays, and those that only check


COMPUTE: Final = (Track.LAYERS, Track.HEAD, Track.SAMPLING)
"""The tracks of the compute unit that do not lie within one another."""
WEIGHT_LINKS: Final = (Track.DISK_READ, Track.TO_GPU)
"""What streamed weights may come over."""


@dataclasses.dataclass(slots=True)
class Total:
    """Sums over one track. `busy_s` counts overlapping spans of several threads each, `covered_s`
    the wall seconds in which at least one was open.
    """

    num_spans: int = 0
    busy_s: float = 0.0
    covered_s: float = 0.0
    num_bytes: int = 0
    flops: int = 0

    def since(self, earlier: "Total") -> "Total":
        return Total(
            num_spans=self.num_spans - earlier.num_spans,
            busy_s=self.busy_s - earlier.busy_s,
            covered_s=self.covered_s - earlier.covered_s,
            num_bytes=self.num_bytes - earlier.num_bytes,
            flops=self.flops - earlier.flops,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One span: seconds of `time.perf_counter`, the thread that it ran on."""

    track: Track
    name: str
    started_s: float
    ended_s: float
    num_bytes: int
    thread: str
    flops: int = 0


class Sink(Protocol):
    """Where single events go, one call at a time whatever the thread."""

    def span(self, event: Event) -> None: ...
    def count(self, name: str, value: int, *, at_s: float) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Coverage:
    """Wall seconds in which at least one span was open. Spans may overlap and come out of order."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []  # disjoint, in order
        self._settled_s = 0.0
        self._horizon_s = -math.inf

    def add(self, started_s: float, ended_s: float) -> None:
        started_s = max(started_s, self._horizon_s)
        if ended_s <= started_s:
            return
        spans = self._spans
        first = bisect.bisect_left(spans, started_s, key=lambda span: span[1])
        last = bisect.bisect_right(spans, ended_s, key=lambda span: span[0])
        if first < last:
            started_s = min(started_s, spans[first][0])
            ended_s = max(ended_s, spans[last - 1][1])
        spans[first:last] = [(started_s, ended_s)]

    def settle(self, before_s: float) -> None:
        """Keep only the sum of the spans that ended before; what comes later does not change it."""
        count = bisect.bisect_right(self._spans, before_s, key=lambda span: span[1])
        if count:
            self._settled_s += sum(end - start for start, end in self._spans[:count])
            self._horizon_s = self._spans[count - 1][1]
            del self._spans[:count]

    @property
    def seconds(self) -> float:
        return self._settled_s + sum(end - start for start, end in self._spans)


class _Idle:
    """Sweep time in which neither compute nor one link was busy: what sweeps cover beyond these."""

    def __init__(self, link: Track) -> None:
        self._busy_tracks = frozenset((*COMPUTE, link))
        self.busy = Coverage()
        self.all = Coverage()

    def add(self, track: Track, started_s: float, ended_s: float) -> None:
        if track in self._busy_tracks:
            self.busy.add(started_s, ended_s)
        if track in self._busy_tracks or track is Track.SWEEP:
            self.all.add(started_s, ended_s)

    @property
    def seconds(self) -> float:
        return max(0.0, self.all.seconds - self.busy.seconds)


class Timeline:
    """Totals of every track; each single span goes to `sink` as it ends, and is kept in `events` if
    `keep_events`. Any thread may add to it. Close it if it has a sink.

    Memory is bounded without `keep_events`: what ended before the last sweep but one is a sum.
    """

    def __init__(self, *, sink: Sink | None = None, keep_events: bool = False) -> None:
        self._lock = threading.Lock()
        self._totals = {track: Total() for track in Track}
        self._covered = {track: Coverage() for track in Track}
        self._idle = {link: _Idle(link) for link in WEIGHT_LINKS}
        self._sink = sink
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
            self._covered[track].add(started_s, ended_s)
            for idle in self._idle.values():
                idle.add(track, started_s, ended_s)
            if track is Track.SWEEP:
                self._settle(started_s)
            if self._keep_events or self._sink is not None:
                thread = threading.current_thread().name
                event = Event(track, name, started_s, ended_s, num_bytes, thread, flops)
                self._hand_on(event)

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

    def count(self, name: str, value: int) -> None:
        """Note a quantity as it is now; for the sink alone."""
        if self._sink is not None:
            with self._lock:
                self._sink.count(name, value, at_s=time.perf_counter())

    def totals(self) -> Mapping[Track, Total]:
        """A copy: what was added so far."""
        with self._lock:
            return {
                track: dataclasses.replace(total, covered_s=self._covered[track].seconds)
                for track, total in self._totals.items()
            }

    def idle_s(self) -> Mapping[Track, float]:
        """By weight link, the seconds of sweeps in which neither compute nor that link was busy."""
        with self._lock:
            return {link: idle.seconds for link, idle in self._idle.items()}

    def flush(self) -> None:
        if self._sink is not None:
            with self._lock:
                self._sink.flush()

    def close(self) -> None:
        if self._sink is not None:
            with self._lock:
                self._sink.close()
                self._sink = None

    def _hand_on(self, event: Event) -> None:
        if self._keep_events:
            self.events.append(event)
        if self._sink is not None:
            self._sink.span(event)

    def _settle(self, before_s: float) -> None:
        for coverage in self._covered.values():
            coverage.settle(before_s)
        for idle in self._idle.values():
            idle.busy.settle(before_s)
            idle.all.settle(before_s)
