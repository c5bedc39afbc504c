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
from engine.memory.manifest import (
    LEARNED_FILE,
    MANIFEST_FILE,
    Pack,
    PackedTensor,
    PackGroup,
    align,
)
from engine.memory.pack_plan import PackPlan, open_own, place_groups, plan_conversion
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


def plan_groups(
    checkpoint: Checkpoint, skeleton: nn.Module, *, in_place: bool = False
) -> tuple[PackGroup, ...]:
    """The groups that a pack of this checkpoint has, before a byte of it is read or written."""
    return place_groups(Conversion(checkpoint, skeleton), Path(), in_place=in_place)


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
    checker = RangeChecker(pack)
    for tensor in group.tensors:
        if tensor.name in values:
            checker.check(group, tensor, 0, bytes_of(values[tensor.name].contiguous()))


def check_range(pack: Pack, group: PackGroup, offset_bytes: int, data: torch.Tensor) -> None:
    """Check what was read of the group from `offset_bytes` on: a flat uint8 tensor on the host.

    Those chunks of its tensors are checked that lie wholly in the range. Raises what
    `RangeChecker.check` does.
    """
    checker = RangeChecker(pack)
    end_bytes = offset_bytes + len(data)
    for tensor in group.tensors:
        start = max(tensor.offset_bytes, offset_bytes)
        end = min(tensor.offset_bytes + tensor.num_bytes, end_bytes)
        if start < end:
            part = data[start - offset_bytes : end - offset_bytes]
            checker.check(group, tensor, start - tensor.offset_bytes, part)


class RangeChecker:
    """Checks slices of a pack's tensors as they are read. Not thread-safe.

    Checksums are of each 1 MiB of a tensor, counted from its start. A chunk that one slice ends in
    is checked when the slice that adjoins it comes next; of others, when they lie wholly in one.
    """

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._begun: dict[str, tuple[int, int]] = {}  # by tensor: bytes seen, the chunk's checksum

    def check(
        self, group: PackGroup, tensor: PackedTensor, offset_bytes: int, data: torch.Tensor
    ) -> None:
        """`offset_bytes` counts from the tensor's start; `data` is flat uint8 on the host.

        PackError if a chunk differs from what was written; the pack is then given up, so that the
        next start writes it anew. CheckpointError if it differs from what was first read of the
        source, which nobody can mend but whoever has another copy.
        """
        seen_bytes, running = self._begun.pop(tensor.name, (0, 0))
        position = offset_bytes
        if seen_bytes != offset_bytes:
            position, running = align(offset_bytes, CHUNK_BYTES), 0
        end_bytes = offset_bytes + len(data)
        while position < end_bytes:
            chunk = position // CHUNK_BYTES
            chunk_end = min((chunk + 1) * CHUNK_BYTES, tensor.num_bytes)
            stop = min(chunk_end, end_bytes)
            running = checksum(data[position - offset_bytes : stop - offset_bytes], running)
            if stop == chunk_end:
                self._compare(group, tensor, chunk, running)
                running = 0
            else:
                self._begun[tensor.name] = stop, running
            position = stop

    def _compare(self, group: PackGroup, tensor: PackedTensor, chunk: int, found: int) -> None:
        if tensor.checksums:
            expected = tensor.checksums[chunk]
        else:
            expected = self._pack.learned.expected(tensor.name, chunk, found)
        if found != expected:
            _give_up(self._pack, group, tensor, f"{found:08x}, not {expected:08x}")


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
