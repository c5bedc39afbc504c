"""What a model weighs: bytes of its layers and of a token's keys and values; no tensors."""

import dataclasses

from engine.planning.policy import Tier


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """`layer_tensor_bytes[i]` are the stored bytes of layer i's tensors in the pack's order.

    An element is stored in `stored_itemsize` bytes at least; on the compute tier it takes
    `compute_itemsize`.
    """

    layer_tensor_bytes: tuple[tuple[int, ...], ...]
    outer_bytes: int
    stored_itemsize: int
    compute_itemsize: int
    compute_dtype: str
    kv_bytes_per_token: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context_tokens: int

    @property
    def num_layers(self) -> int:
        return len(self.layer_tensor_bytes)

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        return tuple(sum(tensors) for tensors in self.layer_tensor_bytes)

    def reads_in_place(self, compute: Tier) -> bool:
        """Whether streamed layers are computed in the very buffers that they are read to."""
        return compute is Tier.CPU and self.stored_itemsize == self.compute_itemsize

    def computed_bytes(self, stored_bytes: int) -> int:
        """What `stored_bytes` of weights take on the compute tier."""
        return (
            stored_bytes * max(self.compute_itemsize, self.stored_itemsize) // self.stored_itemsize
        )
