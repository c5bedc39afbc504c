"""A group's tensors cut by where their bytes live, and where a read leaves each; no devices, no
threads.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Final

import torch

from engine.errors import EngineError
from engine.memory.kinds import Kind
from engine.memory.layout import BUFFERS
from engine.memory.manifest import PackedTensor, PackGroup
from engine.memory.tiers import PAGE_BYTES
from engine.planning.policy import Split, Tier

_BORDER_ROWS: Final = 32
"""Kernels compute in blocks of no more rows."""


def split_groups(groups: Sequence[PackGroup]) -> tuple[list[PackGroup], list[PackGroup]]:
    """A pack's layers, first to last, and its other groups of parameters."""
    layers = [group for group in groups if group.name.startswith("layers.")]
    outer = [group for group in groups if group not in layers and group.name != BUFFERS]
    return layers, outer


def rows_of(tensor: PackedTensor, kind: Kind) -> int:
    """Into how many equal parts the tensor may be cut: rows, or experts, or none."""
    return 1 if kind is Kind.WHOLE else tensor.shape[0]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes of one tensor that lie together: rows `first` to `last`, experts of a stack."""

    group: PackGroup
    tensor: PackedTensor
    first: int
    last: int
    row_bytes: int

    @property
    def offset_bytes(self) -> int:
        """In the pack's data file."""
        within = self.tensor.offset_bytes + self.first * self.row_bytes
        return self.group.offset_bytes + within

    @property
    def num_bytes(self) -> int:
        return (self.last - self.first) * self.row_bytes

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with it."""
        return self.last * self.row_bytes == self.tensor.num_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        if self.row_bytes == self.tensor.num_bytes:
            return self.tensor.shape
        return (self.last - self.first, *self.tensor.shape[1:])

    def view(self, raw: torch.Tensor) -> torch.Tensor:
        """The piece's own uint8 bytes in stored dtype and shape."""
        return raw.view(self.tensor.dtype).view(self.shape)

    def cut(self, num_rows: int) -> list["Piece"]:
        """Pieces of at most so many rows."""
        return [
            dataclasses.replace(self, first=first, last=min(first + num_rows, self.last))
            for first in range(self.first, self.last, num_rows)
        ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """One group's placed tensors by where they live, in the pack's order."""

    resident: tuple[Piece, ...]
    hosted: tuple[Piece, ...]
    on_disk: tuple[Piece, ...]


NOTHING: Final = Parts(resident=(), hosted=(), on_disk=())


def whole_piece(group: PackGroup, tensor: PackedTensor, kind: Kind) -> Piece:
    num_rows = rows_of(tensor, kind)
    return Piece(
        group=group,
        tensor=tensor,
        first=0,
        last=num_rows,
        row_bytes=tensor.num_bytes // num_rows,
    )


def part(pieces: Sequence[Piece], split: Split, compute: Tier) -> Parts:
    """Cut whole tensors at the split's borders. Raises EngineError for one that lies on no row."""
    total = sum(piece.num_bytes for piece in pieces)
    if split.total_bytes != total or (compute is Tier.CPU and split.gpu_bytes):
        raise EngineError(
            f"the policy's split of {_name(pieces)} places {split.total_bytes:,} bytes "
            f"({split.gpu_bytes:,} of them on the GPU) and there are {total:,} to place for the "
            f"{compute} tier to compute with"
        )
    resident, rest = _cut(pieces, split.resident_bytes(compute))
    hosted, on_disk = _cut(rest, split.cpu_bytes if compute is Tier.GPU else 0)
    return Parts(resident=tuple(resident), hosted=tuple(hosted), on_disk=tuple(on_disk))


def cut_stretches(parts: Parts, limit_bytes: int, *, stacks: Collection[str]) -> list[Parts]:
    """What streams, in stretches of one tier and of at most so many bytes, unless one row has more.

    They are in the pack's order; but stacks, by name, take turns: a forward needs all of an expert.
    """
    streamed = parts.hosted + parts.on_disk
    largest = max((each.row_bytes for each in streamed if each.tensor.name in stacks), default=1)
    num_experts = max(1, limit_bytes // largest)
    stretches: list[Parts] = []
    for tier in ("hosted", "on_disk"):
        cut: list[Piece] = []
        for piece in getattr(parts, tier):
            is_stack = piece.tensor.name in stacks
            cut += _at_most(piece, num_experts if is_stack else _num_rows(piece, limit_bytes))
        stretches += [
            dataclasses.replace(NOTHING, **{tier: run})
            for run in _join(_in_turns(cut, stacks, num_experts), limit_bytes)
        ]
    return stretches


def _num_rows(piece: Piece, limit_bytes: int) -> int:
    num_rows = max(1, limit_bytes // piece.row_bytes)
    return num_rows // _BORDER_ROWS * _BORDER_ROWS or num_rows


def _at_most(piece: Piece, num_rows: int) -> list[Piece]:
    """Cut where multiples of so many rows of the tensor end."""
    inner = range((piece.first // num_rows + 1) * num_rows, piece.last, num_rows)
    borders = itertools.pairwise([piece.first, *inner, piece.last])
    return [dataclasses.replace(piece, first=first, last=last) for first, last in borders]


def _in_turns(
    pieces: Sequence[Piece], stacks: Collection[str], num_experts: int
) -> Iterator[list[Piece]]:
    """Pieces that lie together: matrices as they come; of stacks side by side, the same experts."""
    for is_stack, run in itertools.groupby(pieces, key=lambda each: each.tensor.name in stacks):
        if not is_stack:
            yield list(run)
        else:
            yield from ([each] for each in sorted(run, key=lambda each: each.first // num_experts))


def _join(groups: Iterator[list[Piece]], limit_bytes: int) -> list[tuple[Piece, ...]]:
    """Neighbours of a group, as many as the limit allows."""
    runs: list[tuple[Piece, ...]] = []
    for group in groups:
        runs.append(())
        for piece in group:
            if Span((*runs[-1], piece)).num_bytes > limit_bytes and runs[-1]:
                runs.append(())
            runs[-1] += (piece,)
    return runs


def _cut(pieces: Sequence[Piece], leading_bytes: int) -> tuple[list[Piece], list[Piece]]:
    head: list[Piece] = []
    tail: list[Piece] = []
    for piece in pieces:
        wanted = min(max(0, leading_bytes), piece.num_bytes)
        leading_bytes -= piece.num_bytes
        num_rows, over = divmod(wanted, piece.row_bytes)
        if over:
            raise EngineError(
                f"the policy's split of {piece.group.name} has a border at byte {wanted:,} of "
                f"{piece.tensor.name}, whose rows are {piece.row_bytes:,} bytes: the nearest "
                f"border is at {wanted - over:,}"
            )
        border = piece.first + num_rows
        if border > piece.first:
            head.append(dataclasses.replace(piece, last=border))
        if border < piece.last:
            tail.append(dataclasses.replace(piece, first=border))
    return head, tail


def _name(pieces: Sequence[Piece]) -> str:
    return pieces[0].group.name if pieces else "a layer without matrices"


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Adjacent pieces of one group and the gaps between them: one read, one copy."""

    pieces: tuple[Piece, ...]

    @property
    def offset_bytes(self) -> int:
        """In the pack's data file; 0 for an empty one."""
        return self.pieces[0].offset_bytes if self.pieces else 0

    @property
    def num_bytes(self) -> int:
        if not self.pieces:
            return 0
        return self.pieces[-1].offset_bytes + self.pieces[-1].num_bytes - self.offset_bytes

    @property
    def stored_bytes(self) -> int:
        """Of the pieces alone."""
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def skipped_bytes(self) -> int:
        """Between the page that the span starts in and its start: where a read leaves it."""
        return self.offset_bytes % PAGE_BYTES

    @property
    def buffer_bytes(self) -> int:
        """What a buffer needs for the span's pages, wherever in the first and last it lies."""
        return self.num_bytes + 2 * PAGE_BYTES if self.pieces else 0

    def runs(self, left_out: Collection[Piece]) -> list["Span"]:
        """What remains of it without these pieces: as few spans as there are gaps, and one."""
        groups = itertools.groupby(self.pieces, key=lambda piece: piece in left_out)
        return [Span(tuple(run)) for is_left_out, run in groups if not is_left_out]

    def view(self, piece: Piece, buffer: torch.Tensor) -> torch.Tensor:
        """One of its pieces in a uint8 buffer that starts with the span's first page."""
        start = self.skipped_bytes + piece.offset_bytes - self.offset_bytes
        return piece.view(buffer[start : start + piece.num_bytes])
