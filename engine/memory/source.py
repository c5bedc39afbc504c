"""One tensor of a source file: where its bytes lie and how they become values. Knows no model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from engine.errors import CheckpointError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """Lazy: no byte is read before it is indexed, and every indexing reads anew.

    `decode` turns the `num_bytes` raw bytes into values of `shape` and `dtype`.
    """

    path: Path
    offset_bytes: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    decode: Callable[[torch.Tensor], torch.Tensor]

    def __getitem__(self, index: object) -> torch.Tensor:
        """The whole tensor, whatever the index: the library's loader asks with an ellipsis."""
        values = self.decode(read_bytes(self.path, self.offset_bytes, self.num_bytes))
        return values.reshape(self.shape)


def read_bytes(path: Path, offset_bytes: int, num_bytes: int) -> torch.Tensor:
    """A fresh uint8 tensor. Plain reads, not a map: mapped pages would count as resident."""
    raw = torch.empty(num_bytes, dtype=torch.uint8)
    with path.open("rb") as file:
        file.seek(offset_bytes)
        num_read = file.readinto(raw.numpy().data)
    if num_read != num_bytes:
        raise CheckpointError(
            f"{path} ended early: {num_read} of {num_bytes} bytes at offset {offset_bytes}"
        )
    return raw


def reinterpret_as(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Decoding for values stored as they are. An empty tensor has no bytes to view."""
    return lambda raw: raw.view(dtype) if raw.numel() else torch.empty(0, dtype=dtype)
