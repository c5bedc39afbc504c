"""In how many units what streams of a layer is fetched, as `engine/memory/placement.py` cuts it: by
byte counts alone.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import Placeable

UNIT_BYTES: Final[Mapping[Tier, int]] = MappingProxyType(
    {Tier.CPU: 16 * 2**20, Tier.GPU: 64 * 2**20}
)
"""By the tier that computes: as much as its disk or link is fast at, and little to wait for."""

UNIT_SLOTS: Final = 4
"""For one micro-batch: one unit computes, two are filled ahead, one slot is spare."""

_BORDER_ROWS: Final = 32
"""What matrices are cut by, where so many rows fit a unit."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """`count` of a layer, of which `on_disk` have anything to read."""

    count: int
    on_disk: int


def units_of(tensors: Sequence[Placeable], split: Split, policy: Policy) -> Units:
    """Of one layer: none where nothing streams, one where all that streams comes at once."""
    if not split.streamed_bytes(policy.compute):
        return Units(count=0, on_disk=0)
    resident = split.resident_bytes(policy.compute)
    hosted = split.cpu_bytes if policy.compute is Tier.GPU else 0
    near = list(_between(tensors, resident, resident + hosted))
    far = list(_between(tensors, resident + hosted, split.total_bytes))
    is_whole = any(piece.tensor.is_whole for piece in (*near, *far))
    if policy.unit_bytes is None or is_whole or _span_bytes((*near, *far)) <= policy.unit_bytes:
        return Units(count=1, on_disk=1 if far else 0)
    stacks = [each.tensor.granule_bytes for each in (*near, *far) if each.tensor.is_stack]
    num_experts = max(1, policy.unit_bytes // max(stacks, default=1))
    counts = [_num_stretches(each, policy.unit_bytes, num_experts) for each in (near, far)]
    return Units(count=sum(counts), on_disk=counts[1])


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes `first` to `last` of a tensor."""

    tensor: Placeable
    first: int
    last: int

    @property
    def num_bytes(self) -> int:
        return self.last - self.first

    @property
    def gap_bytes(self) -> int:
        """From its end to what follows it."""
        return self.tensor.gap_bytes if self.last == self.tensor.num_bytes else 0


def _between(tensors: Sequence[Placeable], start: int, end: int) -> Iterator[_Piece]:
    """What lies there of each tensor."""
    border = 0
    for tensor in tensors:
        first, last = max(start - border, 0), min(end - border, tensor.num_bytes)
        if first < last:
            yield _Piece(tensor, first, last)
        border += tensor.num_bytes


def _span_bytes(pieces: Sequence[_Piece]) -> int:
    return sum(each.num_bytes for each in pieces) + sum(each.gap_bytes for each in pieces[:-1])


def _num_stretches(pieces: Sequence[_Piece], unit_bytes: int, num_experts: int) -> int:
    """Of one tier: neighbouring parts of matrices as many as fit, and each part of a stack alone."""
    count = 0
    filled: int | None = None  # of the stretch that is open
    for piece in pieces:
        if piece.tensor.is_stack:
            count += sum(1 for _ in _cut(piece, num_experts * piece.tensor.granule_bytes))
            filled = None
            continue
        for part in _cut(piece, _step_bytes(piece.tensor, unit_bytes)):
            if filled is None or filled + part.num_bytes > unit_bytes:
                count += 1
                filled = 0
            filled += part.num_bytes + part.gap_bytes
    return count


def _step_bytes(tensor: Placeable, unit_bytes: int) -> int:
    row_bytes = tensor.row_bytes or tensor.granule_bytes
    num_rows = max(1, unit_bytes // row_bytes)
    return row_bytes * (num_rows // _BORDER_ROWS * _BORDER_ROWS or num_rows)


def _cut(piece: _Piece, step_bytes: int) -> Iterator[_Piece]:
    """Where multiples of so many bytes of the tensor end."""
    inner = range((piece.first // step_bytes + 1) * step_bytes, piece.last, step_bytes)
    for first, last in itertools.pairwise([piece.first, *inner, piece.last]):
        yield _Piece(piece.tensor, first, last)
