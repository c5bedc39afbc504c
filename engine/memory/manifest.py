"""What lies where in a pack, and the JSON file that says so. Opens no weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

import torch

from engine.errors import PackError
from engine.memory.checksums import LearnedChecksums

DATA_FILE: Final = "weights.bin"
MANIFEST_FILE: Final = "manifest.json"
LEARNED_FILE: Final = "learned_checksums.txt"

ALIGNMENT_BYTES: Final = 4096  # of groups: what direct reads ask for
TENSOR_ALIGNMENT_BYTES: Final = 64  # of tensors inside a group: a cache line


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """`offset_bytes` counts from the start of its group; it is a multiple of the item's size.

    `checksums` are of each 1 MiB of the tensor's own bytes; empty where they are yet to be learned.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    num_bytes: int
    checksums: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackGroup:
    """One contiguous range of the file `path`: the pack's own, or the source's where it lies well.

    `offset_bytes` is a multiple of 4096. In the pack's own file so is `num_bytes`, tensors start on
    64 bytes and stand in the model's order; in the source's file they stand as they are there.
    """

    name: str
    path: Path
    offset_bytes: int
    num_bytes: int
    tensors: tuple[PackedTensor, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """`path` is the pack's own file; its groups follow each other in it without gaps.

    It is absent when every group is read where it lies in the source.
    """

    path: Path
    groups: tuple[PackGroup, ...]
    learned: LearnedChecksums = dataclasses.field(compare=False, repr=False)

    @classmethod
    def at(cls, folder: Path, groups: tuple[PackGroup, ...]) -> "Pack":
        learned = LearnedChecksums(folder / LEARNED_FILE)
        return cls(path=folder / DATA_FILE, groups=groups, learned=learned)

    @property
    def num_bytes(self) -> int:
        """What the pack's own file takes on disk."""
        return own_bytes(self.groups, self.path)

    def group(self, name: str) -> PackGroup:
        return next(group for group in self.groups if group.name == name)


def own_bytes(groups: tuple[PackGroup, ...], path: Path) -> int:
    """Bytes of the groups that lie in the file `path`."""
    return sum(group.num_bytes for group in groups if group.path == path)


def align(num_bytes: int, alignment_bytes: int) -> int:
    return -(-num_bytes // alignment_bytes) * alignment_bytes


def place_group(
    name: str, path: Path, offset_bytes: int, tensors: dict[str, torch.Tensor]
) -> PackGroup:
    """Give each tensor (meta will do) its place in the pack's own file."""
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
        path=path,
        offset_bytes=offset_bytes,
        num_bytes=align(end, ALIGNMENT_BYTES),
        tensors=tuple(placed),
    )


def write_manifest(groups: tuple[PackGroup, ...], folder: Path) -> None:
    with (folder / MANIFEST_FILE).open("w") as file:
        json.dump(groups_as_json(groups), file, separators=(",", ":"))


def _read_manifest(folder: Path) -> Pack:
    """PackError when the file is absent or not a manifest."""
    path = folder / MANIFEST_FILE
    try:
        groups = json.loads(path.read_bytes())
        return Pack.at(folder, tuple(_group_from_json(group, folder) for group in groups))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackError(f"{path} is not a pack's manifest: {error!r}") from error


def open_pack(folder: Path) -> Pack:
    """PackError unless the manifest reads and the files it names have the size it promises."""
    pack = _read_manifest(folder)
    file_bytes = pack.path.stat().st_size if pack.path.is_file() else 0
    if file_bytes != pack.num_bytes or not pack.groups:
        raise PackError(f"{pack.path} has {file_bytes} bytes, its manifest says {pack.num_bytes}")
    for group in pack.groups:
        end_bytes = group.offset_bytes + group.num_bytes
        if not group.path.is_file() or group.path.stat().st_size < end_bytes:
            raise PackError(f"{group.path} does not have the {end_bytes} bytes of {group.name}")
    return pack


def groups_as_json(groups: tuple[PackGroup, ...]) -> list[dict[str, Any]]:
    return [_group_as_json(group) for group in groups]


def _group_as_json(group: PackGroup) -> dict[str, Any]:
    """The pack's own file goes by its name alone, so that the folder may be renamed."""
    fields = dataclasses.asdict(group)
    fields["path"] = DATA_FILE if group.path.name == DATA_FILE else str(group.path)
    for tensor in fields["tensors"]:
        tensor["dtype"] = str(tensor["dtype"]).removeprefix("torch.")
    return fields


def _group_from_json(fields: dict[str, Any], folder: Path) -> PackGroup:
    tensors = tuple(
        PackedTensor(
            **tensor
            | {
                "shape": tuple(tensor["shape"]),
                "dtype": getattr(torch, tensor["dtype"]),
                "checksums": tuple(tensor["checksums"]),
            }
        )
        for tensor in fields["tensors"]
    )
    # An absolute path replaces the folder: the source's file.
    return PackGroup(**fields | {"path": folder / fields["path"], "tensors": tensors})
