"""The weights of one model over its tiers: resident parts bound once, streamed parts fetched ahead
into slots. Knows packs, placements and devices; not what is computed.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from engine.errors import EngineError, PackError
from engine.memory.binding import Binder
from engine.memory.chosen import ChosenExperts
from engine.memory.loading import Loader
from engine.memory.manifest import Pack
from engine.memory.matrix import Slice, Whole
from engine.memory.ring import Slot, SlotRing
from engine.memory.shapes import num_chosen_experts
from engine.memory.tiers import HostArena, page_aligned, page_floor
from engine.memory.units import Placement, Unit
from engine.planning.policy import Policy
from engine.planning.routing import fetches_chosen
from engine.timeline import Timeline, Track


@dataclasses.dataclass(slots=True)
class WeightCounters:
    """What streaming cost so far. `streamed_bytes` are stored bytes of what was fetched of acquired
    parts; `fetched_s` is of fetches, `waited_s` compute time lost to weights not yet there.
    """

    streamed_bytes: int = 0
    fetched_s: float = 0.0
    waited_s: float = 0.0


class WeightSource(Protocol):
    """What the executor needs of weights: a layer is there between `acquire` and `release`.

    After the layers the head's streamed tiles come as further units, and every sweep visits all.
    """

    counters: WeightCounters

    @property
    def head_units(self) -> range: ...
    def slices_of(self, unit: int) -> Sequence[Slice]: ...
    def begin(self, num_tokens: int) -> None: ...
    def acquire(self, unit: int) -> None: ...
    def release(self, unit: int) -> None: ...
    def rewind(self) -> None: ...
    def close(self) -> None: ...


class StreamedWeights:
    """Puts something in every parameter's place; units visited in cyclic order find theirs filled.

    `acquire` blocks until the unit's streamed part is there, `release` lets its slot be filled
    again, for a unit further on: across the border of a sweep too. A failed read surfaces in
    `acquire`. Close it.

    In a sweep whose tokens are sent to few experts, stacks are not fetched ahead: an expert is, when
    it is asked for. The first units of a sweep, one for each slot, came as the sweep before wanted.
    """

    def __init__(
        self,
        pack: Pack,
        model: Any,  # transformers' models are untyped
        policy: Policy,
        *,
        device: torch.device,
        timeline: Timeline | None = None,
    ) -> None:
        self.counters = WeightCounters()
        self._device = device
        self._timeline = timeline or Timeline()
        self._copy_stream = _stream(device) if device.type == "cuda" else None
        self._binder = Binder(model, device)
        self._placement = Placement(pack, self._binder, policy, device)
        self._units = self._placement.units
        self._order = [index for index, unit in enumerate(self._units) if unit.targets]
        self._checked: set[tuple[int, bool]] = (
            set()
        )  # units that were read before, in part or whole
        self._num_chosen = num_chosen_experts(model.config)
        self._num_tokens: int | None = None  # of this sweep, once that is known
        self._visited = 0  # streamed units acquired in this sweep
        self._held: tuple[int, Slot] | None = None
        with contextlib.ExitStack() as undo:
            self._loader = Loader(pack, self._timeline)
            undo.callback(self._loader.close)
            self._chosen = ChosenExperts(pack, self._timeline, self._count_expert)
            undo.callback(self._chosen.close)
            slots = self._load(undo, policy.num_slots)
            self._give_room_to_wholes()
            self._ring = SlotRing(
                slots, num_units=len(self._order), fill=self._fill, ahead=policy.overlap
            )
            self._undo = undo.pop_all()

    # -- the executor's side ---------------------------------------------------------------

    @property
    def head_units(self) -> range:
        return range(self._placement.num_layers, len(self._units))

    def slices_of(self, unit: int) -> Sequence[Slice]:
        """The streamed slices that are bound while the unit is held."""
        return [target for target in self._units[unit].targets if isinstance(target, Slice)]

    def begin(self, num_tokens: int) -> None:
        """A sweep of so many tokens begins."""
        self._num_tokens = num_tokens

    def acquire(self, unit: int) -> None:
        wanted = self._units[unit]
        if not wanted.targets:
            return
        found, slot = self._take(wanted)
        assert self._order[found] == unit, f"units are visited in order: {unit} was asked"
        if slot.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        self._visited += 1
        self._held = unit, slot
        self.counters.fetched_s += slot.fetched_s
        for piece, target in zip(wanted.streamed.pieces, wanted.targets, strict=True):
            if not slot.in_part or piece not in wanted.stacks:
                self.counters.streamed_bytes += piece.num_bytes
                target.bind(wanted.streamed.view(piece, slot.bytes))
        if slot.in_part:
            self._chosen.bind(wanted, slot, self._placement.hosted(wanted))

    def release(self, unit: int) -> None:
        if not self._units[unit].targets:
            return
        assert self._held is not None, f"unit {unit} is not held"
        _, slot = self._held
        for target in self._units[unit].targets:
            target.unbind()
        if slot.drained is not None:
            slot.drained.record(torch.cuda.current_stream(self._device))
        self._held = None
        self._visited %= len(self._order)
        slot.num_tokens = self._num_tokens
        self._ring.give_back()

    def rewind(self) -> None:
        """After a sweep that broke off: let the rest of its units pass, so that the next sweep
        finds the first. Reading that has failed stays failed.
        """
        if self._held is not None:
            self.release(self._held[0])
        with contextlib.suppress(EngineError):
            for unit in self._order[self._visited :] if self._visited else ():
                self.acquire(unit)
                self.release(unit)

    def close(self) -> None:
        self._ring.close()
        if self._copy_stream is not None:
            self._copy_stream.synchronize()  # its last copies write to slots that are freed next
        self._undo.close()

    def _count_expert(self, num_bytes: int, waited_s: float) -> None:
        self.counters.streamed_bytes += num_bytes
        self.counters.fetched_s += waited_s
        self.counters.waited_s += waited_s

    def _take(self, unit: Unit) -> tuple[int, Slot]:
        started_s = time.perf_counter()
        try:
            return self._ring.take()
        except Exception as error:
            raise EngineError(f"weights of {unit.name} cannot be read: {error}") from error
        finally:
            ended_s = time.perf_counter()
            self.counters.waited_s += ended_s - started_s
            self._timeline.add(Track.WAIT, unit.name, started_s=started_s, ended_s=ended_s)

    # -- the fetching side -----------------------------------------------------------------

    def _fill(self, turn: int, slot: Slot) -> None:
        """From disk through the staging buffer, from host memory directly."""
        unit = self._units[self._order[turn]]
        slot.in_part = self._comes_in_part(unit, slot.num_tokens)
        started_s = time.perf_counter()
        if slot.copy is not None:
            self._finish_copy(slot)  # the staging buffer's last copy has left it
        for part in unit.fetched_ahead(unit.on_disk, in_part=slot.in_part):
            self._loader.read_part(part, unit.on_disk, slot.staging)
            if (turn, slot.in_part) not in self._checked:
                self._loader.check(unit.on_disk, slot.staging, part=part)
        self._checked.add((turn, slot.in_part))
        if self._copy_stream is not None:
            self._start_copy(unit, slot, self._copy_stream)
        slot.fetched_s = time.perf_counter() - started_s

    def _comes_in_part(self, unit: Unit, num_tokens: int | None) -> bool:
        """Whether so many tokens are sent to few of the unit's experts."""
        if num_tokens is None or self._num_chosen is None or not unit.stacks:
            return False
        num_experts = min(stack.tensor.shape[0] for stack in unit.stacks)
        return fetches_chosen(num_experts, self._num_chosen, num_tokens)

    def _start_copy(self, unit: Unit, slot: Slot, stream: torch.cuda.Stream) -> None:
        assert slot.started is not None
        assert slot.filled is not None
        assert slot.drained is not None
        first_page = page_floor(unit.streamed.offset_bytes)
        num_bytes = 0
        with torch.cuda.stream(stream):
            stream.wait_event(slot.drained)
            slot.started.record(stream)
            for span in (unit.hosted, unit.on_disk):
                hosted = self._placement.hosted(unit)
                home = slot.staging if span is unit.on_disk or hosted is None else hosted
                for part in unit.fetched_ahead(span, in_part=slot.in_part):
                    at = part.offset_bytes - first_page
                    target = slot.bytes[at : at + part.num_bytes]
                    start = part.offset_bytes - page_floor(span.offset_bytes)
                    source = home.bytes[start : start + part.num_bytes]
                    target.copy_(source, non_blocking=True)
                    num_bytes += part.num_bytes
            slot.filled.record(stream)
        slot.copy = unit.name, num_bytes, time.perf_counter()

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

    # -- setting up ------------------------------------------------------------------------

    def _load(self, undo: contextlib.ExitStack, num_slots: int) -> list[Slot]:
        """Load what stays, and make the slots that the rest is streamed through. Raises PackError."""
        staged_bytes = max((unit.on_disk.buffer_bytes for unit in self._units), default=0)
        arena_bytes = self._placement.hosted_bytes
        if self._order:
            arena_bytes += num_slots * page_aligned(staged_bytes)
        arena = HostArena(arena_bytes, pinned=self._device.type == "cuda")
        undo.callback(arena.close)
        try:
            self._placement.load(self._loader, arena, self._timeline, undo)
        except OSError as error:
            raise PackError(f"the weights cannot be loaded: {error}") from error
        if not self._order:
            return []
        device_bytes = max(unit.streamed.buffer_bytes for unit in self._units)
        return [
            Slot(arena.take(staged_bytes), device_bytes=device_bytes, device=self._device)
            for _ in range(num_slots)
        ]

    def _give_room_to_wholes(self) -> None:
        """One stretch of memory that whole tensors of any layer are converted into: one layer
        computes at a time.
        """
        wholes = [_converted_wholes(unit) for unit in self._units]
        room = torch.empty(
            max((sum(num_bytes for _, num_bytes in each) for each in wholes), default=0),
            dtype=torch.uint8,
            device=self._device,
        )
        for each in wholes:
            start = 0
            for whole, num_bytes in each:
                whole.unpacked = room[start : start + num_bytes]
                start += num_bytes


def _converted_wholes(unit: Unit) -> list[tuple[Whole, int]]:
    """The unit's streamed tensors that are computed from whole, in another dtype; their bytes."""
    return [
        (target, target.unpacked_bytes(piece.shape))
        for piece, target in zip(unit.streamed.pieces, unit.targets, strict=True)
        if isinstance(target, Whole) and target.dtype != piece.tensor.dtype
    ]


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
