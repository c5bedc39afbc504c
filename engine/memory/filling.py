"""A unit's bytes brought to a slot: from disk through the slot's staging buffer, from host memory
directly. Knows no order.
"""

import threading
import time

import torch

from engine.memory.loading import Loader
from engine.memory.ring import Slot
from engine.memory.tiers import page_floor
from engine.memory.units import Placement, Unit
from engine.timeline import Timeline, Track


class Filler:
    """Fills slots with units of a placement; what is read for the first time is checked.

    A reader and a computing thread may both call it. Close it when the ring is closed.
    """

    def __init__(
        self, placement: Placement, loader: Loader, *, device: torch.device, timeline: Timeline
    ) -> None:
        self._placement = placement
        self._loader = loader
        self._device = device
        self._timeline = timeline
        self._stream = _stream(device) if device.type == "cuda" else None
        self._checked: set[tuple[int, bool]] = set()  # units that were read, in part or whole
        self._reading = threading.Lock()

    def fill(self, slot: Slot, index: int, *, in_part: bool) -> None:
        """Ahead: a GPU's copy is on its way then. Raises OSError, PackError, CheckpointError."""
        started_s = time.perf_counter()
        if slot.copy is not None:
            self._finish_copy(slot)  # the staging buffer's last copy has left it
        self._read(slot, index, in_part=in_part)
        if self._stream is not None:
            self._start_copy(slot, self._placement.units[index], self._stream)
        slot.fetched_s = time.perf_counter() - started_s

    def fill_now(self, slot: Slot, index: int) -> None:
        """All of it, for the stream that computes. Raises what `fill` does."""
        started_s = time.perf_counter()
        self._read(slot, index, in_part=False)
        if self._stream is not None:
            self._copy(slot, self._placement.units[index])
            torch.cuda.current_stream(self._device).synchronize()  # the staging is free again
        slot.fetched_s = time.perf_counter() - started_s

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()  # its last copies write to slots that are freed next

    def _read(self, slot: Slot, index: int, *, in_part: bool) -> None:
        slot.unit, slot.in_part = index, in_part
        unit = self._placement.units[index]
        with self._reading:
            for part in unit.fetched_ahead(unit.on_disk, in_part=in_part):
                self._loader.read_part(part, unit.on_disk, slot.staging)
                if (index, in_part) not in self._checked:
                    self._loader.check(unit.on_disk, slot.staging, part=part)
            self._checked.add((index, in_part))

    def _start_copy(self, slot: Slot, unit: Unit, stream: torch.cuda.Stream) -> None:
        assert slot.started is not None
        assert slot.filled is not None
        assert slot.drained is not None
        with torch.cuda.stream(stream):
            stream.wait_event(slot.drained)
            slot.started.record(stream)
            num_bytes = self._copy(slot, unit)
            slot.filled.record(stream)
        slot.copy = unit.name, num_bytes, time.perf_counter()

    def _copy(self, slot: Slot, unit: Unit) -> int:
        """To the GPU on the current stream, what is fetched ahead: its bytes."""
        first_page = page_floor(unit.streamed.offset_bytes)
        num_bytes = 0
        hosted = self._placement.hosted(unit)
        for span in (unit.hosted, unit.on_disk):
            home = slot.staging if span is unit.on_disk or hosted is None else hosted
            for part in unit.fetched_ahead(span, in_part=slot.in_part):
                at = part.offset_bytes - first_page
                start = part.offset_bytes - page_floor(span.offset_bytes)
                target = slot.bytes[at : at + part.num_bytes]
                target.copy_(home.bytes[start : start + part.num_bytes], non_blocking=True)
                num_bytes += part.num_bytes
        return num_bytes

    def _finish_copy(self, slot: Slot) -> None:
        assert slot.started is not None
        assert slot.filled is not None
        assert slot.copy is not None
        slot.filled.synchronize()
        name, num_bytes, issued_s = slot.copy
        slot.copy = None
        took_s = slot.started.elapsed_time(slot.filled) / 1000  # the event counts milliseconds
        self._timeline.add(
            Track.TO_GPU, name, started_s=issued_s, ended_s=issued_s + took_s, num_bytes=num_bytes
        )


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
