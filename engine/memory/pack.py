"""The pack: a model's weights on disk, written once, group after group, in the order of a sweep.

A pack is a folder `<spill_dir>/packs/<identity>/` of a data file and a manifest. It appears whole,
by a rename, or not at all. Knows nothing of tiers or of when a group is read.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import torch
from torch import nn

from engine.errors import BudgetError, CheckpointError, PackError
from engine.memory.checkpoint import Checkpoint
from engine.memory.conversion import Conversion
from engine.memory.layout import BUFFERS
from engine.memory.manifest import (
    Pack,
    PackedTensor,
    PackGroup,
    place_group,
    read_manifest,
    write_manifest,
)
from engine.memory.source import read_bytes

DATA_FILE: Final = "weights.bin"
MANIFEST_FILE: Final = "manifest.json"

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all


def ensure_pack(
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    *,
    spill_dir: Path,
    disk_bytes: int,
    progress: Progress | None = None,
    verified: bool = False,
) -> Pack:
    """The pack of this checkpoint: the one that is there if it is whole, else a new one.

    A pack whose size is wrong is written anew; with `verified`, so is one whose checksums are. One
    process writes at a time, others wait and then find it. Raises BudgetError before writing.
    """
    folder = spill_dir / "packs" / checkpoint.identity
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        with contextlib.suppress(PackError):
            pack = open_pack(folder)
            if verified:
                verify(pack)
            return pack
        for leftover in (folder, _partial(folder)):
            shutil.rmtree(leftover, ignore_errors=True)
        conversion = Conversion(checkpoint, skeleton)
        groups = _place(conversion)
        _require_disk(sum(group.num_bytes for group in groups), folder.parent, disk_bytes)
        return _write(conversion, groups, folder, progress)


def plan_groups(checkpoint: Checkpoint, skeleton: nn.Module) -> tuple[PackGroup, ...]:
    """The groups that a pack of this checkpoint has, before a byte of it is read or written."""
    return _place(Conversion(checkpoint, skeleton))


def open_pack(folder: Path) -> Pack:
    """PackError unless the manifest reads and the data file has the size it promises."""
    pack = read_manifest(folder / MANIFEST_FILE, folder / DATA_FILE)
    file_bytes = pack.path.stat().st_size if pack.path.is_file() else 0
    if file_bytes != pack.num_bytes or not pack.groups:
        raise PackError(f"{pack.path} has {file_bytes} bytes, its manifest says {pack.num_bytes}")
    return pack


def verify(pack: Pack) -> None:
    """Read all of the pack; PackError names the first tensor whose checksum differs."""
    for group in pack.groups:
        check_tensors(pack, group, read_group(pack, group.name))


def check_tensors(pack: Pack, group: PackGroup, values: Mapping[str, torch.Tensor]) -> None:
    """PackError if a tensor read from the group differs from what was written."""
    for tensor in group.tensors:
        if tensor.name not in values:
            continue
        require_checksum(pack, group, tensor, crc32_of(values[tensor.name]))


def require_checksum(pack: Pack, group: PackGroup, tensor: PackedTensor, crc32: int) -> None:
    """PackError if the tensor's bytes have another checksum than what was written; the pack is then
    given up, so that the next start writes it anew.
    """
    if crc32 != tensor.crc32:
        pack.path.with_name(MANIFEST_FILE).unlink(missing_ok=True)
        raise PackError(
            f"{pack.path} is damaged: {tensor.name} in {group.name} has checksum {crc32:08x}, "
            f"its manifest says {tensor.crc32:08x}; it will be written anew"
        )


def crc32_of(value: torch.Tensor, before: int = 0) -> int:
    """Of a tensor's bytes; `before` is the checksum of what comes before them."""
    return zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data, before)


def read_group(pack: Pack, name: str) -> dict[str, torch.Tensor]:
    """One group in plain memory: for small groups and for tests, not for the sweep."""
    group = pack.group(name)
    raw = read_bytes(pack.path, group.offset_bytes, group.num_bytes)
    return {
        tensor.name: raw[tensor.offset_bytes : tensor.offset_bytes + tensor.num_bytes]
        .view(tensor.dtype)
        .reshape(tensor.shape)
        for tensor in group.tensors
    }


def load_buffers(pack: Pack, model: nn.Module) -> None:
    """Copy the buffers that came with the checkpoint into the model; few models have any.

    CheckpointError if one is left that neither the checkpoint nor the library gave a value.
    """
    persistent = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    if any(group.name == BUFFERS for group in pack.groups):
        for name, value in read_group(pack, BUFFERS).items():
            buffers[name].copy_(value)
    unset = [name for name, b in buffers.items() if b.is_floating_point() and b.isnan().any()]
    if unset:
        raise CheckpointError(
            f"{pack.path} lacks {len(unset)} of {len(buffers)} buffers: {', '.join(unset[:3])}"
        )


def _place(conversion: Conversion) -> tuple[PackGroup, ...]:
    groups: list[PackGroup] = []
    offset_bytes = 0
    for name in conversion.layout.group_names:
        tensors = conversion.tensors_of(name)
        if tensors:
            groups.append(place_group(name, offset_bytes, tensors))
            offset_bytes += groups[-1].num_bytes
    return tuple(groups)


def _require_disk(need_bytes: int, folder: Path, budget_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if need_bytes > budget_bytes:
        raise BudgetError(
            f"the pack needs {need_bytes} bytes of disk, the disk budget is {budget_bytes}"
        )
    if need_bytes > free_bytes:
        raise BudgetError(
            f"the pack needs {need_bytes} bytes of disk, {folder} has {free_bytes} free"
        )


def _write(
    conversion: Conversion,
    groups: tuple[PackGroup, ...],
    folder: Path,
    progress: Progress | None,
) -> Pack:
    partial = _partial(folder)
    partial.mkdir()
    total_bytes = sum(group.num_bytes for group in groups)
    written: list[PackGroup] = []
    try:
        with (partial / DATA_FILE).open("wb") as file:
            for group in groups:
                written.append(_write_group(file, group, conversion.read(group.name)))
                if progress is not None:
                    progress(group.offset_bytes + group.num_bytes, total_bytes)
            _flush(file)
        write_manifest(
            Pack(path=folder / DATA_FILE, groups=tuple(written)), partial / MANIFEST_FILE
        )
        _sync(partial / MANIFEST_FILE)
        _sync(partial)
        partial.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Pack(path=folder / DATA_FILE, groups=tuple(written))


def _write_group(file: BinaryIO, group: PackGroup, values: dict[str, torch.Tensor]) -> PackGroup:
    """Write the tensors and the zeros between them; the group with their checksums."""
    end = 0
    written = []
    for tensor in group.tensors:
        value = values.pop(tensor.name).contiguous()
        assert value.dtype == tensor.dtype, tensor.name
        assert tuple(value.shape) == tensor.shape, tensor.name
        file.write(bytes(tensor.offset_bytes - end))
        file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        written.append(dataclasses.replace(tensor, crc32=crc32_of(value)))
        end = tensor.offset_bytes + tensor.num_bytes
    file.write(bytes(group.num_bytes - end))
    return dataclasses.replace(group, tensors=tuple(written))


def _flush(file: BinaryIO) -> None:
    """To the disk, then out of the page cache: its pages would count against the memory limit."""
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
