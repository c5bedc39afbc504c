"""Where every weight of a pack lies under a policy: what is loaded for good, and the units that
stream. Fetches nothing twice and knows no slots.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Final

import torch

from engine.errors import EngineError
from engine.memory.binding import Binder, Target
from engine.memory.embedding import RowReader
from engine.memory.kinds import Kind
from engine.memory.layout import BUFFERS
from engine.memory.loading import Loader
from engine.memory.manifest import Pack
from engine.memory.matrix import Slice
from engine.memory.placement import Parts, Piece, Span, part, split_groups, whole_piece
from engine.memory.tiers import HostArena, HostBuffer, page_aligned
from engine.planning.cost import HEAD_TILE_BYTES
from engine.planning.policy import Policy, Split
from engine.timeline import Timeline

_NOTHING: Final = Parts(resident=(), hosted=(), on_disk=())


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """What is there between one acquire and release: the streamed part of a layer, or a tile of the
    head. `hosted` lies in host memory, the rest on disk; both go to one slot. `stacks` are those of
    its pieces that can be fetched expert by expert.
    """

    name: str
    hosted: Span
    on_disk: Span
    targets: tuple[Target, ...]
    stacks: tuple[Piece, ...]

    @property
    def streamed(self) -> Span:
        return Span(self.hosted.pieces + self.on_disk.pieces)

    def fetched_ahead(self, span: Span, *, in_part: bool) -> list[Span]:
        """What of one of its spans is fetched before it is acquired."""
        if not in_part:
            return [span] if span.pieces else []
        return span.runs(self.stacks)


class Placement:
    """A pack cut by a policy, and bound to a skeleton. `load` fills what does not stream.

    Raises EngineError where the policy does not fit the pack.
    """

    def __init__(self, pack: Pack, binder: Binder, policy: Policy, device: torch.device) -> None:
        self._pack = pack
        self._binder = binder
        self._policy = policy
        self._device = device
        self._resident: list[tuple[Piece, Target]] = []
        self._hosted: dict[str, HostBuffer] = {}
        layers, outer = split_groups(pack.groups)
        self.num_layers = len(layers)
        self._table: Piece | None = None
        self._head: Piece | None = None
        for piece in (each for group in outer for each in self._placeable(group.name)):
            if binder.kinds[piece.tensor.name] is Kind.TABLE:
                self._table = piece
            else:
                self._head = piece
        self._require_policy()
        self.units = [
            self._unit(group.name, self._part(self._placeable(group.name), split))
            for group, split in zip(layers, policy.layer_splits, strict=True)
        ]
        self._head_parts = self._part_one(self._head, policy.head_split)
        self.units += self._head_units()
        self._table_parts = self._part_one(self._table, policy.embedding_split)

    def _placeable(self, group_name: str) -> list[Piece]:
        group = self._pack.group(group_name)
        kinds = self._binder.kinds
        return [
            whole_piece(group, tensor, kinds[tensor.name])
            for tensor in group.tensors
            if kinds[tensor.name] is not Kind.FIXED
        ]

    def _require_policy(self) -> None:
        policy = self._policy
        if len(policy.layer_splits) != self.num_layers:
            raise EngineError(
                f"the policy splits {len(policy.layer_splits)} layers, there are {self.num_layers}"
            )
        for what, split, piece in (
            ("head", policy.head_split, self._head),
            ("embedding", policy.embedding_split, self._table),
        ):
            if split is not None and piece is None:
                raise EngineError(f"the policy splits the {what}, and this model has none to place")

    def _part(self, pieces: Sequence[Piece], split: Split) -> Parts:
        parts = part(pieces, split, self._policy.compute)
        for piece in parts.resident:
            self._resident.append((piece, self._binder.target(piece, is_streamed=False)))
        return parts

    def _part_one(self, piece: Piece | None, split: Split | None) -> Parts:
        if piece is None:
            return _NOTHING
        return self._part([piece], split or Split.on(self._policy.compute, piece.num_bytes))

    def _unit(self, name: str, parts: Parts) -> Unit:
        streamed = parts.hosted + parts.on_disk
        return Unit(
            name=name,
            hosted=Span(parts.hosted),
            on_disk=Span(parts.on_disk),
            targets=tuple(self._binder.target(piece, is_streamed=True) for piece in streamed),
            stacks=tuple(
                piece for piece in streamed if self._binder.kinds[piece.tensor.name] is Kind.STACK
            ),
        )

    def _head_units(self) -> list[Unit]:
        """The head's streamed rows in tiles that fit a layer's slot."""
        parts = self._head_parts
        if self._head is None or not parts.hosted + parts.on_disk:
            return []
        layer_bytes = max((unit.streamed.num_bytes for unit in self.units), default=0)
        num_rows = max(1, max(layer_bytes, HEAD_TILE_BYTES) // self._head.row_bytes)
        tiles = [
            dataclasses.replace(_NOTHING, **{tier: (tile,)})
            for tier, pieces in (("hosted", parts.hosted), ("on_disk", parts.on_disk))
            for piece in pieces
            for tile in piece.cut(num_rows)
        ]
        return [self._unit(f"head tile {index}", tile) for index, tile in enumerate(tiles)]

    # -- loading ---------------------------------------------------------------------------

    @property
    def hosted_bytes(self) -> int:
        """Of an arena that holds all hosted spans."""
        return sum(page_aligned(unit.hosted.buffer_bytes) for unit in self.units)

    def load(
        self, loader: Loader, arena: HostArena, timeline: Timeline, undo: contextlib.ExitStack
    ) -> None:
        """Read and bind what stays; `undo` closes what was opened. Raises PackError, OSError."""
        for group in self._pack.groups:
            for tensor in group.tensors if group.name != BUFFERS else ():
                if self._binder.kinds[tensor.name] is Kind.FIXED:
                    self._binder.bind_fixed(tensor.name, loader.load_tensor(group, tensor))
        for piece, target in self._resident:
            target.bind(loader.load_piece(piece, self._device))
        for unit in self.units:
            if unit.hosted.pieces:
                buffer = arena.take(unit.hosted.buffer_bytes)
                loader.read(unit.hosted, buffer)
                loader.check(unit.hosted, buffer)
                self._hosted[unit.name] = buffer
        self._bind_embedding(loader, timeline, undo)

    def hosted(self, unit: Unit) -> HostBuffer | None:
        """What holds the unit's hosted span; None if that is empty."""
        return self._hosted.get(unit.name)

    def _bind_embedding(
        self, loader: Loader, timeline: Timeline, undo: contextlib.ExitStack
    ) -> None:
        table, parts = self._table, self._table_parts
        tied = self._head is not None and (
            self._binder.kinds[self._head.tensor.name] is Kind.TIED_HEAD
        )
        if tied:
            table, parts = self._head, self._head_parts
        if table is None:
            return
        reader = None
        if parts.on_disk:
            reader = RowReader(self._pack, table, timeline)
            undo.callback(reader.close)
        self._binder.bind_embedding(
            table.tensor.name,
            held=[
                *self._held_on_compute_tier(table),
                *self._held_in_host(parts, loader, tied=tied),
            ],
            reader=reader,
        )

    def _held_on_compute_tier(self, table: Piece) -> list[Slice]:
        return [
            target
            for piece, target in self._resident
            if piece.tensor is table.tensor and isinstance(target, Slice)
        ]

    def _held_in_host(self, parts: Parts, loader: Loader, *, tied: bool) -> list[Slice]:
        """Rows in host memory beside a GPU: of a tied table those that the head's tiles stream."""
        spans = [(unit.hosted, unit) for unit in self.units[self.num_layers :]] if tied else []
        held = []
        for span, unit in spans:
            for piece in span.pieces:
                held.append(Slice(piece.first, piece.last))
                held[-1].bind(span.view(piece, self._hosted[unit.name].bytes))
        for piece in () if tied else parts.hosted:
            held.append(Slice(piece.first, piece.last))
            held[-1].bind(loader.load_piece(piece, torch.device("cpu")))
        return held
