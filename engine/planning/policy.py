"""The decision as data: which bytes live where, how large the block is, and why; nothing acts here."""

import dataclasses
import enum

from engine.errors import BudgetError


class Tier(enum.StrEnum):
    """Where bytes live."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Bytes of one layer's weights in each tier, in whole tensors of the pack's order.

    What lies on the compute tier is resident; the rest is streamed once a sweep. With the CPU as
    compute tier `gpu_bytes` is 0 and `cpu_bytes` is the resident part.
    """

    gpu_bytes: int
    cpu_bytes: int
    disk_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.gpu_bytes + self.cpu_bytes + self.disk_bytes

    def streamed_bytes(self, compute: Tier) -> int:
        """Bytes that cross a link in each sweep."""
        return self.disk_bytes if compute is Tier.CPU else self.disk_bytes + self.cpu_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One decision for a whole run. The engine executes exactly this or refuses it.

    `layer_splits` are in stored bytes, as in the pack; `kv_bytes` are allocated on `kv_tier`,
    where attention then runs.
    """

    compute: Tier
    compute_dtype: str
    block_rows: int
    sweep_tokens: int
    """Prompt tokens that one sweep may carry beside the decoding rows."""
    micro_batch_tokens: int
    """Tokens of one forward call: bounds activations."""
    kv_tier: Tier
    kv_bytes: int
    layer_splits: tuple[Split, ...]
    reason: str
    overlap: bool = True
    """Fetch coming layers while others compute; without, each when it is asked for."""

    def __post_init__(self) -> None:
        for name in ("block_rows", "sweep_tokens", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise BudgetError(f"a policy's {name} is at least 1, not {getattr(self, name)}")

    @property
    def streamed_bytes(self) -> int:
        """Weight bytes that cross a link in each sweep."""
        return sum(split.streamed_bytes(self.compute) for split in self.layer_splits)
