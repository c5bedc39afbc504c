"""One tensor of a source file: where its bytes lie and how they become values. Knows no model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from engine.errors import CheckpointError

_PIECE_BYTES: Final = 4 * 2**20  # of raw bytes decoded at once: what comes of them is larger


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How stored blocks become values: `decode` takes whole blocks, in any number, and gives the
    values in them, flat.
    """

    block_bytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """Lazy: no byte is read before it is indexed, and every indexing reads anew.

    Without `blocks` the bytes are the values. `arrange` puts the values in the library's order.
    """

    path: Path
    offset_bytes: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Blocks | None = None
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def is_verbatim(self) -> bool:
        """Whether the file's bytes are the tensor's."""
        return self.blocks is None and self.arrange is None

    def __getitem__(self, index: object) -> torch.Tensor:
        """The whole tensor, whatever the index: the library's loader asks with an ellipsis.

        Memory holds the values and one piece of raw bytes. Raises CheckpointError.
        """
        values = torch.empty(self.shape, dtype=self.dtype)
        if self.blocks is None:
            read_into(bytes_of(values), self.path, self.offset_bytes)
        else:
            self._decode_into(values.view(-1), self.blocks)
        return values if self.arrange is None else self.arrange(values)

    def _decode_into(self, flat: torch.Tensor, blocks: Blocks) -> None:
        done = 0
        step_bytes = max(1, _PIECE_BYTES // blocks.block_bytes) * blocks.block_bytes
        for start in range(0, self.num_bytes, step_bytes):
            num_bytes = min(step_bytes, self.num_bytes - start)
            piece = blocks.decode(read_bytes(self.path, self.offset_bytes + start, num_bytes))
            flat[done : done + piece.numel()] = piece.view(-1)
            done += piece.numel()
        assert done == flat.numel(), f"{done} values decoded for {self.shape}"


def read_bytes(path: Path, offset_bytes: int, num_bytes: int) -> torch.Tensor:
    """A fresh uint8 tensor. Raises CheckpointError for a file that ends early."""
    raw = torch.empty(num_bytes, dtype=torch.uint8)
    read_into(raw, path, offset_bytes)
    return raw


def read_into(raw: torch.Tensor, path: Path, offset_bytes: int) -> None:
    """Fill the uint8 tensor. Plain reads, not a map: mapped pages would count as resident."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset_bytes)
        target = memoryview(raw.numpy().data)
        num_read = 0
        while count := file.readinto(target[num_read:]):
            num_read += count
    if num_read != raw.numel():
        raise CheckpointError(
            f"{path} ended early: {num_read} of {raw.numel()} bytes at offset {offset_bytes}"
        )


def bytes_of(values: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's own bytes, as a flat view."""
    return values.reshape(-1).view(torch.uint8)
