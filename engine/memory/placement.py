"""A layer's tensors by where they live, and where a direct read leaves each; no devices, no threads."""

import dataclasses
from collections.abc import Sequence

import torch

from engine.errors import EngineError
from engine.memory.layout import BUFFERS
from engine.memory.manifest import PackedTensor, PackGroup
from engine.memory.tiers import PAGE_BYTES, DirectReader, HostBuffer
from engine.planning.policy import Split, Tier


def split_groups(groups: Sequence[PackGroup]) -> tuple[list[PackGroup], list[PackGroup]]:
    """A pack's layers, first to last, and its other groups of parameters."""
    layers = [group for group in groups if group.name.startswith("layers.")]
    outer = [group for group in groups if group not in layers and group.name != BUFFERS]
    return layers, outer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """One layer's tensors by where they live: whole tensors, in the pack's order."""

    group: PackGroup
    resident: tuple[PackedTensor, ...]
    hosted: tuple[PackedTensor, ...]
    on_disk: tuple[PackedTensor, ...]

    @property
    def streamed(self) -> tuple[PackedTensor, ...]:
        return self.hosted + self.on_disk


def part_layer(group: PackGroup, split: Split, compute: Tier) -> LayerParts:
    """Cut the group's tensors at the split's borders. Raises EngineError if a border cuts one."""
    resident_bytes = split.gpu_bytes if compute is Tier.GPU else split.cpu_bytes
    host_bytes = split.cpu_bytes if compute is Tier.GPU else 0
    parts = []
    rest = group.tensors
    for wanted_bytes in (resident_bytes, host_bytes, split.disk_bytes):
        taken = 0
        count = 0
        while taken < wanted_bytes and count < len(rest):
            taken += rest[count].num_bytes
            count += 1
        if taken != wanted_bytes:
            raise EngineError(
                f"the policy's split of {group.name} asks for {wanted_bytes:,} bytes in a tier, "
                f"which is not a whole number of its tensors (nearest {taken:,})"
            )
        parts.append(rest[:count])
        rest = rest[count:]
    if rest:
        raise EngineError(
            f"the policy's split of {group.name} places {split.total_bytes:,} bytes and leaves "
            f"{len(rest)} of its {len(group.tensors)} tensors in no tier"
        )
    return LayerParts(group=group, resident=parts[0], hosted=parts[1], on_disk=parts[2])


def read_tensors(
    reader: DirectReader, buffer: HostBuffer, group: PackGroup, tensors: tuple[PackedTensor, ...]
) -> dict[str, torch.Tensor]:
    """Adjacent tensors in one read, as views into `buffer` in stored dtype."""
    if not tensors:
        return {}
    first_bytes = group.offset_bytes + tensors[0].offset_bytes
    reader.read(buffer, offset_bytes=first_bytes, num_bytes=span_bytes(tensors))
    return views_of(buffer, group, tensors)


def views_of(
    buffer: HostBuffer, group: PackGroup, tensors: tuple[PackedTensor, ...]
) -> dict[str, torch.Tensor]:
    """Where a direct read of the adjacent tensors leaves each of them in `buffer`."""
    if not tensors:
        return {}
    first = tensors[0].offset_bytes
    skipped = (group.offset_bytes + first) % PAGE_BYTES
    views = {}
    for tensor in tensors:
        raw = buffer.bytes[skipped + tensor.offset_bytes - first :][: tensor.num_bytes]
        views[tensor.name] = raw.view(tensor.dtype).view(tensor.shape)
    return views


def span_bytes(tensors: tuple[PackedTensor, ...]) -> int:
    if not tensors:
        return 0
    return tensors[-1].offset_bytes + tensors[-1].num_bytes - tensors[0].offset_bytes
