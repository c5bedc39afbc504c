"""What lies where in a pack, and the JSON file that says so. Opens no weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

import torch

from engine.errors import PackError

ALIGNMENT_BYTES: Final = 4096  # of groups: what direct reads ask for
TENSOR_ALIGNMENT_BYTES: Final = 64  # of tensors inside a group: a cache line


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """`offset_bytes` counts from the start of its group; `crc32` is of the tensor's own bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    num_bytes: int
    crc32: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackGroup:
    """`offset_bytes` and `num_bytes` are multiples of 4096."""

    name: str
    offset_bytes: int
    num_bytes: int
    tensors: tuple[PackedTensor, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """`path` is the data file; the groups follow each other in it without gaps."""

    path: Path
    groups: tuple[PackGroup, ...]

    @property
    def num_bytes(self) -> int:
        return sum(group.num_bytes for group in self.groups)

    def group(self, name: str) -> PackGroup:
        return next(group for group in self.groups if group.name == name)


def align(num_bytes: int, alignment_bytes: int) -> int:
    return -(-num_bytes // alignment_bytes) * alignment_bytes


def place_group(name: str, offset_bytes: int, tensors: dict[str, torch.Tensor]) -> PackGroup:
    """Give each tensor (meta will do) its place; checksums are not known yet and are 0."""
    placed: list[PackedTensor] = []
    end = 0
    for tensor_name, tensor in tensors.items():
        start = align(end, TENSOR_ALIGNMENT_BYTES)
        end = start + tensor.nbytes
        placed.append(
            PackedTensor(
                name=tensor_name,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                offset_bytes=start,
                num_bytes=tensor.nbytes,
            )
        )
    return PackGroup(
        name=name,
        offset_bytes=offset_bytes,
        num_bytes=align(end, ALIGNMENT_BYTES),
        tensors=tuple(placed),
    )


def write_manifest(pack: Pack, path: Path) -> None:
    with path.open("w") as file:
        json.dump([_group_as_json(group) for group in pack.groups], file, indent=1)


def read_manifest(path: Path, data_path: Path) -> Pack:
    """PackError when the file is absent or not a manifest."""
    try:
        groups = json.loads(path.read_bytes())
        return Pack(path=data_path, groups=tuple(_group_from_json(group) for group in groups))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackError(f"{path} is not a pack's manifest: {error!r}") from error


def _group_as_json(group: PackGroup) -> dict[str, Any]:
    fields = dataclasses.asdict(group)
    for tensor in fields["tensors"]:
        tensor["dtype"] = str(tensor["dtype"]).removeprefix("torch.")
    return fields


def _group_from_json(fields: dict[str, Any]) -> PackGroup:
    tensors = tuple(
        PackedTensor(
            **tensor | {"shape": tuple(tensor["shape"]), "dtype": getattr(torch, tensor["dtype"])}
        )
        for tensor in fields["tensors"]
    )
    return PackGroup(**fields | {"tensors": tensors})
