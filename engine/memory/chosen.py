"""Experts fetched one by one, as tokens are sent to them: each to its place in the slot of a unit
that was filled without them. Knows no routers.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from engine.errors import EngineError
from engine.memory.loading import Loader
from engine.memory.manifest import Pack
from engine.memory.matrix import Slice
from engine.memory.placement import Piece, Span
from engine.memory.ring import Slot
from engine.memory.tiers import HostBuffer
from engine.memory.touched import TouchedChunks
from engine.memory.units import Unit
from engine.timeline import Timeline, Track

Fetched = Callable[[int, float], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Stack:
    """A streamed stack, the slot of its unit, and the span that it reaches `home` in; `here` are the
    experts that have been fetched.
    """

    piece: Piece
    unit: Unit
    slot: Slot
    span: Span
    home: HostBuffer
    here: set[int] = dataclasses.field(default_factory=set)


class ChosenExperts:
    """From `bind` until the unit's slices are unbound an expert is fetched once, however many
    micro-batches choose it. Not thread-safe. Close it.

    `fetched` is told each expert's bytes and the seconds that compute waited for them.
    """

    def __init__(self, pack: Pack, timeline: Timeline, fetched: Fetched) -> None:
        self._pack = pack
        self._loader: Loader | None = None  # its files are opened where any expert is fetched so
        self._timeline = timeline
        self._tell = fetched
        self._checked: set[tuple[str, int]] = set()  # by the stack's name and the expert
        self._chunks: dict[str, TouchedChunks] = {}  # of each stack, by its name

    def bind(self, unit: Unit, slot: Slot, hosted: HostBuffer | None) -> None:
        """Have the unit's stacks ask for their experts here; `hosted` is the host's part of it."""
        for piece, target in zip(unit.streamed.pieces, unit.targets, strict=True):
            if piece in unit.stacks:
                assert isinstance(target, Slice), "a stack is bound slice by slice"
                span, home = unit.on_disk, slot.staging
                if piece in unit.hosted.pieces:
                    assert hosted is not None, "what is hosted lies in a buffer"
                    span, home = unit.hosted, hosted
                stack = _Stack(piece=piece, unit=unit, slot=slot, span=span, home=home)
                target.bind_rows(functools.partial(self._expert, stack))

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def _expert(self, stack: _Stack, expert: int) -> torch.Tensor:
        """(rows, columns), as stored, on the compute tier. Raises EngineError."""
        one = dataclasses.replace(stack.piece, first=expert, last=expert + 1)
        if expert not in stack.here:
            name = f"expert {expert} of {stack.unit.name}"
            started_s = time.perf_counter()
            try:
                self._fetch(stack, one)
            except (OSError, EngineError) as error:
                raise EngineError(f"{name} cannot be read: {error}") from error
            ended_s = time.perf_counter()
            self._timeline.add(Track.WAIT, name, started_s=started_s, ended_s=ended_s)
            self._tell(one.num_bytes, ended_s - started_s)
            stack.here.add(expert)
        return stack.unit.streamed.view(one, stack.slot.bytes).view(one.tensor.shape[1:])

    def _fetch(self, stack: _Stack, one: Piece) -> None:
        """From disk through the staging buffer. A copy to a GPU is waited for: who fills the staging
        buffer next does not know of it.
        """
        if stack.span is stack.unit.on_disk:
            self._loader = self._loader or Loader(self._pack, self._timeline)
            self._loader.read_part(Span((one,)), stack.span, stack.home)
            key = one.tensor.name, one.first
            if key not in self._checked:
                self._check(stack, one)
                self._checked.add(key)
        if stack.slot.bytes is not stack.slot.staging.bytes:
            with self._timeline.span(Track.TO_GPU, stack.unit.name, num_bytes=one.num_bytes):
                target = stack.unit.streamed.view(one, stack.slot.bytes)
                target.copy_(stack.span.view(one, stack.home.bytes))

    def _check(self, stack: _Stack, one: Piece) -> None:
        """From what was just read, and the neighbours' part of the chunks at its ends."""
        tensor = one.tensor
        assert self._loader is not None, "it has just read the expert"
        self._loader.check(stack.span, stack.home, part=Span((one,)))
        if tensor.name not in self._chunks:
            self._chunks[tensor.name] = TouchedChunks(self._pack, one.group, tensor, self._timeline)
        first = one.first * one.row_bytes
        self._chunks[tensor.name].check_borders(first, first + one.num_bytes - 1)
