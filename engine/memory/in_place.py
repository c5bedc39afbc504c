"""Which groups can be read where they lie in the source's files, so that they need no packing."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from engine.memory.conversion import Part
from engine.memory.manifest import ALIGNMENT_BYTES, PackedTensor, PackGroup

# Of a group's bytes, how many may be other tensors' that lie between its own and are read with it.
MAX_WASTE: Final = 1 / 16


def place_in_source(
    name: str, tensors: Mapping[str, torch.Tensor], parts: Sequence[Part]
) -> PackGroup | None:
    """The group as one range of one source file; None where a pack must be written for it.

    That is so where the library fuses, splits, transposes or unpacks a tensor, where the group is
    spread over the file or over several, and where a tensor starts between two of its items.
    `tensors` (meta) say what the model asks for; another shape is left to the conversion to refuse.
    """
    sources = [
        (part.names[0], source)
        for part in parts
        if part.is_renamed_only
        for source in part.sources.values()
    ]
    if len(sources) < len(parts) or not all(
        source.is_verbatim and source.shape == tuple(tensors[tensor_name].shape)
        for tensor_name, source in sources
    ):
        return None
    if len({source.path for _, source in sources}) != 1:
        return None
    sources.sort(key=lambda named: named[1].offset_bytes)
    first, last = sources[0][1], sources[-1][1]
    start = first.offset_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    span_bytes = last.offset_bytes + last.num_bytes - first.offset_bytes
    held_bytes = sum(source.num_bytes for _, source in sources)
    if span_bytes - held_bytes > MAX_WASTE * held_bytes:
        return None
    if any((source.offset_bytes - start) % source.dtype.itemsize for _, source in sources):
        return None
    return PackGroup(
        name=name,
        path=first.path.absolute(),
        offset_bytes=start,
        num_bytes=last.offset_bytes + last.num_bytes - start,
        tensors=tuple(
            PackedTensor(
                name=tensor_name,
                shape=source.shape,
                dtype=source.dtype,
                offset_bytes=source.offset_bytes - start,
                num_bytes=source.num_bytes,
            )
            for tensor_name, source in sources
        ),
    )
