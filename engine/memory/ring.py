"""A ring of slots that one thread fills ahead, in cyclic order, for another that empties it. Knows
nothing of what the bytes mean.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence

import torch

from engine.errors import EngineError
from engine.memory.tiers import HostBuffer


class Slot:
    """A place on the compute tier that streamed parts take turns in, and its way there.

    `bytes` is where they are computed from: the staging buffer itself, unless a device has its own.
    """

    def __init__(self, staging: HostBuffer, *, device_bytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.staging = staging
        self.bytes = staging.bytes
        if on_gpu:
            self.bytes = torch.empty(device_bytes, dtype=torch.uint8, device=device)
        self.started: torch.cuda.Event | None = _event(timing=True) if on_gpu else None
        self.filled: torch.cuda.Event | None = _event(timing=True) if on_gpu else None
        self.drained: torch.cuda.Event | None = _event(timing=False) if on_gpu else None
        if self.drained is not None:
            # Memory that was another's a moment ago: what was asked for of it may still run.
            self.drained.record(torch.cuda.current_stream(device))
        self.copy: tuple[str, int, float] | None = None  # what is on its way: name, bytes, since
        self.num_tokens: int | None = None  # of the sweep that gave it back last
        self.unit = -1  # what it was then filled with
        self.in_part = False  # whether without stacks
        self.fetched_s = 0.0  # what that took


class SlotRing:
    """`fill(turn, slot)` runs on a thread of the ring for unit after unit, around and around, as
    slots are given back; without `ahead` only when `take` asks. `turn` counts from 0 in each round:
    which unit comes then, `fill` knows. What it raises surfaces in `take`, now and ever after.
    Close it.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        num_units: int,
        fill: Callable[[int, Slot], None],
        ahead: bool = True,
    ) -> None:
        self._wanted = None if ahead else threading.Semaphore(0)
        self._slots = slots
        self._num_units = num_units
        self._fill = fill
        self._free = threading.Semaphore(len(slots))
        self._filled: queue.Queue[Slot | BaseException] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="freight-weights", daemon=True)
        if num_units:
            self._thread.start()

    def take(self) -> Slot:
        """The slot that holds the next unit, once it does. Raises what `fill` did."""
        if self._wanted is not None:
            self._wanted.release()
        found = self._filled.get()
        if isinstance(found, BaseException):
            self._filled.put(found)  # for whoever asks next: filling has ended
            raise found
        return found

    def give_back(self) -> None:
        """The slot taken first of those not given back yet may be filled again."""
        self._free.release()

    def close(self) -> None:
        self._stop.set()
        self._free.release()
        if self._wanted is not None:
            self._wanted.release()
        if self._thread.is_alive():
            self._thread.join()
        self._filled.put(EngineError("the weights are closed"))  # for whoever asks all the same

    def _run(self) -> None:
        try:
            for turn in itertools.count():
                if self._wanted is not None:
                    self._wanted.acquire()
                self._free.acquire()
                if self._stop.is_set():
                    return
                slot = self._slots[turn % len(self._slots)]
                self._fill(turn % self._num_units, slot)
                self._filled.put(slot)
        except BaseException as error:  # noqa: BLE001  # handed over: `take` raises it
            self._filled.put(error)


def _event(*, timing: bool) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]  # torch leaves it untyped
