"""The pack: a model's weights on disk, written once, group after group, in the order of a sweep.

A pack is a folder `<spill_dir>/packs/<identity>/` of a manifest and a data file. It appears whole,
by a rename, or not at all. Groups that lie well in the source are read there and not written.
Knows nothing of tiers or of when a group is read.
"""

import contextlib
import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from engine.errors import BudgetError, CheckpointError, PackError
from engine.memory.checkpoint import Checkpoint
from engine.memory.checksums import CHUNK_BYTES, checksum
from engine.memory.conversion import Conversion
from engine.memory.layout import BUFFERS
from engine.memory.manifest import LEARNED_FILE, MANIFEST_FILE, Pack, PackedTensor, PackGroup
from engine.memory.pack_plan import PackPlan, open_own, plan_conversion
from engine.memory.packing import Progress, partial_folder, write_pack
from engine.memory.retention import packs_folder, prune_packs, removable_packs, write_lock
from engine.memory.source import bytes_of, read_bytes

Announce = Callable[[PackPlan], None]


def ensure_pack(
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    *,
    spill_dir: Path,
    disk_bytes: int,
    progress: Progress | None = None,
    announce: Announce | None = None,
    verified: bool = False,
    in_place: bool = False,
) -> Pack:
    """The pack of this checkpoint: the one that is there if it is whole, else a new one.

    A pack whose size is wrong is written anew; with `verified`, so is one whose checksums are. A
    packing that was interrupted goes on where it stopped. One process writes at a time, others wait
    and then find it. With `in_place`, groups that lie well in the source's files stay there.

    `announce` is told the cost before a byte is written. Where room lacks, packs of other sources
    that nobody reads are removed. Raises BudgetError before writing or removing anything, and when
    the disk fills up all the same, CheckpointError for a source that is damaged, PackError.
    """
    folder = packs_folder(spill_dir) / checkpoint.identity
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_lock(folder):
        with contextlib.suppress(PackError):
            pack = open_own(folder, checkpoint, in_place=in_place)
            if verified:
                verify(pack)
            return pack
        shutil.rmtree(folder, ignore_errors=True)
        conversion = Conversion(checkpoint, skeleton)
        plan = plan_conversion(conversion, spill_dir, disk_bytes, in_place=in_place)
        if announce is not None:
            announce(plan)
        _make_room(plan, spill_dir, checkpoint.identity)
        try:
            return Pack.at(folder, write_pack(conversion, plan.groups, folder, progress))
        except OSError as error:
            refusal = BudgetError if error.errno in {errno.ENOSPC, errno.EDQUOT} else PackError
            raise refusal(f"the pack cannot be written: {error} ({plan})") from error


def verify(pack: Pack) -> None:
    """Read all of the pack; PackError or CheckpointError names the first tensor that differs."""
    for group in pack.groups:
        for tensor in group.tensors:
            for at in range(0, tensor.num_bytes, CHUNK_BYTES):
                num_bytes = min(CHUNK_BYTES, tensor.num_bytes - at)
                start = tensor.offset_bytes + at
                data = read_bytes(group.path, group.offset_bytes + start, num_bytes)
                check_range(pack, group, start, data)


def check_tensors(pack: Pack, group: PackGroup, values: Mapping[str, torch.Tensor]) -> None:
    """Like `check_range`, for whole tensors in stored dtype."""
    for tensor in group.tensors:
        if tensor.name in values:
            raw = bytes_of(values[tensor.name].contiguous())
            _check_tensor(pack, group, tensor, offset_bytes=tensor.offset_bytes, data=raw)


def check_range(pack: Pack, group: PackGroup, offset_bytes: int, data: torch.Tensor) -> None:
    """Check what was read of the group from `offset_bytes` on: a flat uint8 tensor on the host.

    Checksums are of each 1 MiB of a tensor, counted from its start; those are checked that lie
    wholly in the range. PackError if one differs from what was written; the pack is then given up,
    so that the next start writes it anew. CheckpointError if one differs from what was first read
    of the source, which nobody can mend but whoever has another copy.
    """
    for tensor in group.tensors:
        if tensor.offset_bytes >= offset_bytes + len(data):
            continue
        if tensor.offset_bytes + tensor.num_bytes > offset_bytes:
            _check_tensor(pack, group, tensor, offset_bytes=offset_bytes, data=data)


def _check_tensor(
    pack: Pack, group: PackGroup, tensor: PackedTensor, *, offset_bytes: int, data: torch.Tensor
) -> None:
    """Check the tensor's chunks that lie wholly in `data`, which starts `offset_bytes` into the
    group.
    """
    skipped = max(0, offset_bytes - tensor.offset_bytes)
    first = -(-skipped // CHUNK_BYTES)
    for chunk in range(first, -(-tensor.num_bytes // CHUNK_BYTES)):
        start = tensor.offset_bytes + chunk * CHUNK_BYTES - offset_bytes
        end = min(start + CHUNK_BYTES, tensor.offset_bytes + tensor.num_bytes - offset_bytes)
        if end > len(data):
            return
        found = checksum(data[start:end])
        if tensor.checksums:
            expected = tensor.checksums[chunk]
        else:
            expected = pack.learned.expected(tensor.name, chunk, found)
        if found != expected:
            _give_up(pack, group, tensor, f"{found:08x}, not {expected:08x}")


def _give_up(pack: Pack, group: PackGroup, tensor: PackedTensor, checksums: str) -> None:
    what = f"{group.path} is damaged: {tensor.name} in {group.name} has checksum {checksums}"
    if group.path != pack.path:
        raise CheckpointError(
            f"{what} as when it was first read; restore the file, or remove "
            f"{pack.path.with_name(LEARNED_FILE)} to trust it as it is"
        )
    pack.path.with_name(MANIFEST_FILE).unlink(missing_ok=True)
    raise PackError(f"{what} as its manifest says; it will be written anew")


def read_group(pack: Pack, name: str) -> dict[str, torch.Tensor]:
    """One group in plain memory: for small groups and for tests, not for the sweep."""
    group = pack.group(name)
    return {
        tensor.name: read_bytes(
            group.path, group.offset_bytes + tensor.offset_bytes, tensor.num_bytes
        )
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


def _make_room(plan: PackPlan, spill_dir: Path, identity: str) -> None:
    """Remove other packs if that makes room; BudgetError, and nothing removed, if it does not."""
    if not plan.resumes_from_bytes:
        shutil.rmtree(partial_folder(plan.path), ignore_errors=True)
    lacking_bytes = plan.lacking_bytes
    if lacking_bytes <= 0:
        return
    removable = removable_packs(spill_dir, {identity})
    spare_bytes = sum(pack.num_bytes for pack in removable)
    if spare_bytes >= lacking_bytes:
        prune_packs(spill_dir, {identity}, need_bytes=lacking_bytes)
        return
    raise BudgetError(
        f"the pack needs {plan.num_bytes} bytes of disk, the disk budget is {plan.budget_bytes}; "
        f"{plan.path.parent} has {plan.free_bytes} free, {plan.resumes_from_bytes} are written, "
        f"other packs take {plan.others_bytes}, of which {spare_bytes} could go"
    )
