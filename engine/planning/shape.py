"""What a model weighs: bytes of its tensors and of a token's keys and values; no tensors."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placeable:
    """A tensor that a policy places, in stored bytes.

    A border may lie at every multiple of `granule_bytes` and at the tensor's end. `unpacked_bytes`
    is what a tensor takes that can only be computed from whole and in another dtype; 0 for others.
    `is_whole`: it can only be computed from whole, so that all of its layer is fetched at once.
    `stored_dtype` is None where it is the one computed in. `is_stack`: a granule is one of several
    experts. `row_bytes` are those of a matrix's row; 0 where a granule is one. `gap_bytes` lie between
    its end and the next tensor of its layer, and are read with both.
    """

    num_bytes: int
    granule_bytes: int
    unpacked_bytes: int = 0
    is_whole: bool = False
    stored_dtype: str | None = None
    is_stack: bool = False
    row_bytes: int = 0
    gap_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """`layers[i]` are layer i's placeable tensors in the pack's order.

    `fixed_bytes`, norms, biases and the like, are always on the compute tier in compute dtype.
    `embedding` and `head` are None where they are among the fixed; a `tied` model has one table for
    both, its head. `scales_logits`: the library works on a second copy of the logits.
    `kv_layer_bytes_per_token` are those of the layer that keeps most; 0 means all keep as much.
    `lookup_bytes_per_token` are what attention on a CPU notes, for a whole sweep, about a cached token
    that a decoding row sees; `widened_bytes_per_token` what it copies of it for one layer.
    """

    layers: tuple[tuple[Placeable, ...], ...]
    fixed_bytes: int
    embedding: Placeable | None
    head: Placeable | None
    tied: bool
    scales_logits: bool
    compute_dtype: str
    compute_itemsize: int
    kv_bytes_per_token: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context_tokens: int
    kv_layer_bytes_per_token: int = 0
    lookup_bytes_per_token: int = 0
    widened_bytes_per_token: int = 0
    layer_bytes: tuple[int, ...] = dataclasses.field(init=False, repr=False, compare=False)
    """Placeable stored bytes of each layer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_bytes", tuple(map(total_bytes, self.layers)))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def head_tensors(self) -> tuple[Placeable, ...]:
        return () if self.head is None else (self.head,)

    @property
    def embedding_tensors(self) -> tuple[Placeable, ...]:
        """Empty for a tied model too: its table is the head."""
        return () if self.embedding is None else (self.embedding,)


def total_bytes(tensors: Sequence[Placeable]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)


def leading_border_bytes(tensors: Sequence[Placeable], limit_bytes: int) -> int:
    """The last place up to `limit_bytes` from the start where a border may lie."""
    border = 0
    for tensor in tensors:
        room = limit_bytes - border
        if room < tensor.num_bytes:
            return border + max(0, room) // tensor.granule_bytes * tensor.granule_bytes
        border += tensor.num_bytes
    return border


def resident_bytes(tensors: Sequence[Placeable], leading_bytes: int) -> int:
    """What the first `leading_bytes` of the tensors take where they are computed from."""
    taken = 0
    for tensor in tensors:
        stored = min(leading_bytes, tensor.num_bytes)
        taken += tensor.unpacked_bytes if stored and tensor.unpacked_bytes else stored
        leading_bytes -= stored
    return taken


def unpacked_bytes(tensors: Sequence[Placeable], leading_bytes: int) -> int:
    """What the tensors after the first `leading_bytes` take beside their slot."""
    border = 0
    needed = 0
    for tensor in tensors:
        if border >= leading_bytes:
            needed += tensor.unpacked_bytes
        border += tensor.num_bytes
    return needed
