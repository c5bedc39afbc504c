"""The weights of one model over its tiers: resident parts bound once, streamed parts fetched ahead
into slots. Knows packs, placements and devices; not what is computed.
"""

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from engine.errors import EngineError, PackError
from engine.memory.binding import Binder
from engine.memory.chosen import ChosenExperts
from engine.memory.filling import Filler
from engine.memory.loading import Loader
from engine.memory.manifest import Pack
from engine.memory.matrix import Slice, Whole
from engine.memory.ring import Slot, SlotRing
from engine.memory.shapes import num_chosen_experts
from engine.memory.tiers import HostArena, page_aligned
from engine.memory.units import Placement, Stage, Unit
from engine.memory.uses import Uses
from engine.planning.policy import Policy
from engine.planning.routing import fetches_chosen
from engine.timeline import Timeline, Track


@dataclasses.dataclass(slots=True)
class WeightCounters:
    """What streaming cost so far. `streamed_bytes` are stored bytes of what was fetched of acquired
    parts; `fetched_s` is of fetches, `waited_s` compute time lost to weights not yet there.
    `num_units` came by the ring, also for nobody, after a sweep that broke off.
    """

    num_units: int = 0
    streamed_bytes: int = 0
    fetched_s: float = 0.0
    waited_s: float = 0.0


class WeightSource(Protocol):
    """What the executor needs of weights: a layer is there, or comes as it is asked for, between
    `acquire` and `release`.

    After the layers the head's streamed tiles come as further stages, and every sweep visits all.
    """

    counters: WeightCounters

    @property
    def head_stages(self) -> range: ...
    def slices_of(self, stage: int) -> Sequence[Slice]: ...
    def begin(self, num_tokens: int) -> None: ...
    def acquire(self, stage: int, *, num_forwards: int = 1) -> None: ...
    def release(self, stage: int) -> None: ...
    def rewind(self) -> None: ...
    def close(self) -> None: ...


class StreamedWeights:
    """Puts something in every parameter's place; stages visited in cyclic order find theirs filled.

    `acquire` blocks until the stage's first unit is there, `release` lets all its slots be filled
    again, for units further on: across the border of a sweep too. In between a layer of several
    units waits for each when a slice in it is asked for, and gives those back, in the order that
    they came, that all forwards are through with (`Uses`).

    That cannot hang, whatever order a model asks in. It waits for the ring only while a slot of the
    ring is free, so that the next unit always comes; and only for units that have not come in this
    visit. A unit that all slots are too full for, or that has gone already, is read into a spare
    slot, out of turn: twice in that sweep, but from then on the layer's units are fetched as its
    modules came. What fails to be read surfaces where it is waited for. Close it.

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
        self._binder = Binder(model, device)
        self._placement = Placement(pack, self._binder, policy, device)
        self._units = self._placement.units
        self._stages = self._placement.stages
        self._uses = {
            at: self._watch(at) for at, each in enumerate(self._stages) if len(each.units) > 1
        }
        self._order = list(range(len(self._units)))  # the next round's; replaced, never changed
        self._round: list[int] = []  # the order that the ring is at
        self._num_chosen = num_chosen_experts(model.config)
        self._num_tokens: int | None = None  # of this sweep, once that is known
        self._stage: int | None = None
        self._came: set[int] = set()  # units of the stage that the ring has brought in this visit
        self._held: deque[Slot] = deque()  # in the order of the ring
        self._spared: int | None = None  # the unit that the spare slot holds
        self._num_spared = 0  # in this visit
        self._visited = 0  # units that were given back in this sweep
        with contextlib.ExitStack() as undo:
            self._loader = Loader(pack, self._timeline)
            undo.callback(self._loader.close)
            self._chosen = ChosenExperts(pack, self._timeline, self._count_expert)
            undo.callback(self._chosen.close)
            self._filler = Filler(
                self._placement, self._loader, device=device, timeline=self._timeline
            )
            slots = self._load(undo, policy.num_slots)
            self._spare = slots.pop() if slots and policy.unit_bytes is not None else None
            self._num_slots = len(slots)
            self._give_room_to_wholes()
            self._ring = SlotRing(
                slots, num_units=len(self._order), fill=self._fill, ahead=policy.overlap
            )
            self._undo = undo.pop_all()

    # -- the executor's side ---------------------------------------------------------------

    @property
    def head_stages(self) -> range:
        return range(self._placement.num_layers, len(self._stages))

    def slices_of(self, stage: int) -> Sequence[Slice]:
        """The streamed slices that can be computed with while the stage is held."""
        return [
            target
            for unit in self._stages[stage].units
            for target in self._units[unit].targets
            if isinstance(target, Slice)
        ]

    def begin(self, num_tokens: int) -> None:
        """A sweep of so many tokens begins."""
        self._num_tokens = num_tokens

    def acquire(self, stage: int, *, num_forwards: int = 1) -> None:
        """`num_forwards` will go through the stage before it is released."""
        if not self._stages[stage].units:
            return
        self._stage = stage
        self._came.clear()
        self._num_spared = 0
        if stage in self._uses:
            self._uses[stage].begin(num_forwards)
        self._advance(self._stages[stage])

    def release(self, stage: int) -> None:
        units = self._stages[stage].units
        if not units:
            return
        assert self._stage == stage, f"{self._stages[stage].name} is not held"
        self._unbind_spare()
        self._give_back_held()
        while len(self._came) < len(units):  # what no forward asked for comes all the same
            self._advance(self._stages[stage])
            self._give_back_held()
        if self._num_spared:
            learned = self._uses[stage].in_order(self._order[units.start : units.stop])
            self._order = self._order[: units.start] + learned + self._order[units.stop :]
        self._visited = units.stop % len(self._units)
        self._stage = None

    def rewind(self) -> None:
        """After a sweep that broke off: let the rest of its units pass, so that the next sweep
        finds the first. Reading that has failed stays failed.
        """
        with contextlib.suppress(EngineError):
            if self._stage is not None:
                self.release(self._stage)
            for stage, each in enumerate(self._stages) if self._visited else ():
                if each.units.start >= self._visited:
                    self.acquire(stage)
                    self.release(stage)

    def close(self) -> None:
        self._ring.close()
        self._filler.close()
        self._undo.close()

    # -- within a visit --------------------------------------------------------------------

    def _watch(self, stage: int) -> Uses:
        """Have a layer of several units say what it asks for, and when it is through with it."""
        units_of: dict[str, list[int]] = {}
        for unit in self._stages[stage].units:
            held = self._units[unit]
            for piece, target in zip(held.streamed.pieces, held.targets, strict=True):
                name = piece.tensor.name
                units = units_of.setdefault(name, [])
                assert isinstance(target, Slice), f"{name} can only be computed with whole"
                target.on_ask = functools.partial(self._ask, stage, name, len(units), target)
                units.append(unit)
        for name in units_of:
            self._binder.on_call_end(name, functools.partial(self._end_call, stage, name))
        return Uses(units_of)

    def _ask(self, stage: int, weight: str, index: int, asked: Slice) -> None:
        """Have the slice's unit here, by the ring or else by the spare slot. Raises EngineError."""
        assert stage == self._stage, "a streamed slice is there between acquire and release"
        uses = self._uses[stage]
        unit = uses.ask(weight, index)
        self._give_back_held(uses)
        while unit not in self._came and len(self._held) < self._num_slots:
            self._advance(self._stages[stage])
            self._give_back_held(uses)
        if not asked.is_bound:
            self._read_out_of_turn(unit)

    def _end_call(self, stage: int, weight: str) -> None:
        if stage == self._stage:
            self._uses[stage].end(weight)
            self._give_back_held(self._uses[stage])

    def _advance(self, stage: Stage) -> None:
        """Hold the unit that the ring brings next."""
        slot = self._take(stage.name)
        assert slot.unit in stage.units, f"stages are visited in order: {stage.name} was asked"
        if slot.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        if slot.unit == self._spared:
            self._unbind_spare()
        self.counters.num_units += 1
        self._came.add(slot.unit)
        self._held.append(slot)
        self._bind(slot)

    def _bind(self, slot: Slot) -> None:
        unit = self._units[slot.unit]
        self.counters.fetched_s += slot.fetched_s
        for piece, target in zip(unit.streamed.pieces, unit.targets, strict=True):
            if not slot.in_part or piece not in unit.stacks:
                self.counters.streamed_bytes += piece.num_bytes
                target.bind(unit.streamed.view(piece, slot.bytes))
        if slot.in_part:
            self._chosen.bind(unit, slot, self._placement.hosted(unit))

    def _give_back_held(self, uses: Uses | None = None) -> None:
        """The slots that came first, up to one that `uses` still needs."""
        while self._held and (uses is None or uses.is_over(self._held[0].unit)):
            slot = self._held.popleft()
            for target in self._units[slot.unit].targets:
                target.unbind()
            if slot.drained is not None:
                slot.drained.record(torch.cuda.current_stream(self._device))
            slot.num_tokens = self._num_tokens
            self._ring.give_back()

    def _take(self, name: str) -> Slot:
        with self._waiting(name):
            return self._ring.take()

    @contextlib.contextmanager
    def _waiting(self, name: str) -> Iterator[None]:
        started_s = time.perf_counter()
        try:
            yield
        except Exception as error:
            raise EngineError(f"weights of {name} cannot be read: {error}") from error
        finally:
            ended_s = time.perf_counter()
            self.counters.waited_s += ended_s - started_s
            self._timeline.add(Track.WAIT, name, started_s=started_s, ended_s=ended_s)

    def _read_out_of_turn(self, index: int) -> None:
        assert self._spare is not None, "layers of several units have a slot to spare"
        self._unbind_spare()
        unit = self._units[index]
        with self._waiting(unit.name):
            self._filler.fill_now(self._spare, index)
        self._spared = index
        self._num_spared += 1
        self._bind(self._spare)

    def _unbind_spare(self) -> None:
        if self._spared is not None:
            for target in self._units[self._spared].targets:
                target.unbind()
            self._spared = None

    def _count_expert(self, num_bytes: int, waited_s: float) -> None:
        self.counters.streamed_bytes += num_bytes
        self.counters.fetched_s += waited_s
        self.counters.waited_s += waited_s

    # -- on the ring's thread --------------------------------------------------------------

    def _fill(self, turn: int, slot: Slot) -> None:
        if turn == 0:
            self._round = self._order
        index = self._round[turn]
        in_part = self._comes_in_part(self._units[index], slot.num_tokens)
        self._filler.fill(slot, index, in_part=in_part)

    def _comes_in_part(self, unit: Unit, num_tokens: int | None) -> bool:
        """Whether so many tokens are sent to few of the unit's experts."""
        if num_tokens is None or self._num_chosen is None or not unit.stacks:
            return False
        num_experts = min(stack.tensor.shape[0] for stack in unit.stacks)
        return fetches_chosen(num_experts, self._num_chosen, num_tokens)

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
