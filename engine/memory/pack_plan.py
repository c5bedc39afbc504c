"""What a pack would be and cost, known before a byte of it is read or written."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

from torch import nn

from engine.errors import PackError
from engine.memory.checkpoint import Checkpoint
from engine.memory.conversion import Conversion
from engine.memory.in_place import place_in_source
from engine.memory.manifest import DATA_FILE, Pack, PackGroup, open_pack, own_bytes, place_group
from engine.memory.packing import resumable_bytes
from engine.memory.retention import kept_packs, packs_folder


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """What a pack costs, known before a byte of it is written.

    `num_bytes` is what its own file takes and `resumes_from_bytes` how many of them an earlier
    writer left; `in_place_bytes` are read where they lie. `free_bytes` are the disk's,
    `budget_bytes` is for all packs of the spill folder, of which others take `others_bytes`.
    """

    path: Path
    groups: tuple[PackGroup, ...]
    num_bytes: int
    in_place_bytes: int
    is_there: bool
    resumes_from_bytes: int
    budget_bytes: int
    free_bytes: int
    others_bytes: int

    @property
    def to_write_bytes(self) -> int:
        return 0 if self.is_there else self.num_bytes - self.resumes_from_bytes

    @property
    def lacking_bytes(self) -> int:
        """What must go elsewhere before the pack can be written; not above 0 where there is room."""
        if self.is_there:
            return 0
        return max(
            self.num_bytes + self.others_bytes - self.budget_bytes,
            self.to_write_bytes - self.free_bytes,
        )

    def __str__(self) -> str:
        """The statement for people."""
        if self.is_there:
            return f"weights are packed in {self.path}: {self.num_bytes:,} bytes"
        parts = [f"packing weights into {self.path}: {self.to_write_bytes:,} bytes to write"]
        if self.resumes_from_bytes:
            parts.append(f"{self.resumes_from_bytes:,} are there from an interrupted packing")
        if self.in_place_bytes:
            parts.append(f"{self.in_place_bytes:,} are read where they lie in the source")
        parts.append(f"the disk budget is {self.budget_bytes:,}")
        parts.append(f"{self.free_bytes:,} are free")
        return ", ".join(parts)


def plan_pack(
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    *,
    spill_dir: Path,
    disk_bytes: int,
    in_place: bool = False,
) -> PackPlan:
    """What `ensure_pack` with the same arguments would find or write. Reads headers only."""
    return plan_conversion(
        Conversion(checkpoint, skeleton), spill_dir, disk_bytes, in_place=in_place
    )


def open_own(folder: Path, checkpoint: Checkpoint, *, in_place: bool) -> Pack:
    """PackError also for a pack that reads elsewhere than in this checkpoint: it was moved."""
    pack = open_pack(folder)
    known = {tensor.path.absolute() for tensor in checkpoint.tensors.values()} if in_place else ()
    for group in pack.groups:
        if group.path != pack.path and group.path not in known:
            raise PackError(f"{folder} reads {group.path}, which is not of {checkpoint.source}")
    return pack


def plan_conversion(
    conversion: Conversion, spill_dir: Path, disk_bytes: int, *, in_place: bool
) -> PackPlan:
    """Like `plan_pack`, for a conversion that is there already."""
    folder = packs_folder(spill_dir) / conversion.checkpoint.identity
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_there = False
    groups = place_groups(conversion, folder, in_place=in_place)
    with contextlib.suppress(PackError):
        groups = open_own(folder, conversion.checkpoint, in_place=in_place).groups
        is_there = True
    kept = kept_packs(spill_dir)
    others = [pack for pack in kept if pack.identity != conversion.checkpoint.identity]
    resumes_from_bytes = 0 if is_there else resumable_bytes(folder, groups)
    # What an earlier writer left and nobody can go on from is removed before anything is written.
    useless = (
        [] if is_there or resumes_from_bytes else [pack for pack in kept if pack not in others]
    )
    return PackPlan(
        path=folder,
        groups=groups,
        num_bytes=own_bytes(groups, folder / DATA_FILE),
        in_place_bytes=sum(g.num_bytes for g in groups if g.path != folder / DATA_FILE),
        is_there=is_there,
        resumes_from_bytes=resumes_from_bytes,
        budget_bytes=disk_bytes,
        free_bytes=shutil.disk_usage(folder.parent).free + sum(p.num_bytes for p in useless),
        others_bytes=sum(pack.num_bytes for pack in others),
    )


def place_groups(conversion: Conversion, folder: Path, *, in_place: bool) -> tuple[PackGroup, ...]:
    """In the order of a sweep; those that are not in place lie in the folder's own file."""
    groups: list[PackGroup] = []
    offset_bytes = 0
    for name in conversion.layout.group_names:
        tensors = conversion.tensors_of(name)
        if not tensors:
            continue
        group = None
        if in_place:
            group = place_in_source(name, tensors, conversion.parts_of(name))
        if group is None:
            group = place_group(name, folder / DATA_FILE, offset_bytes, tensors)
            offset_bytes += group.num_bytes
        groups.append(group)
    return tuple(groups)
