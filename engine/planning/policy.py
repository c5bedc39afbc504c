"""The decision as data: which bytes live where, how large the block is, and why; nothing acts here."""

import dataclasses
import enum
from typing import Self

from engine.errors import BudgetError


class Tier(enum.StrEnum):
    """Where bytes live."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Stored bytes of one layer's placeable tensors in each tier, in the pack's order.

    A border may lie at any row of a matrix and any expert of a stack. What lies on the compute tier
    is resident; the rest is streamed once a sweep. With the CPU as compute tier `gpu_bytes` is 0
    and `cpu_bytes` is the resident part.
    """

    gpu_bytes: int
    cpu_bytes: int
    disk_bytes: int

    @classmethod
    def resident(cls, num_bytes: int, compute: Tier) -> Self:
        """Everything on the compute tier."""
        on_gpu = num_bytes if compute is Tier.GPU else 0
        return cls(gpu_bytes=on_gpu, cpu_bytes=num_bytes - on_gpu, disk_bytes=0)

    @property
    def total_bytes(self) -> int:
        return self.gpu_bytes + self.cpu_bytes + self.disk_bytes

    def resident_bytes(self, compute: Tier) -> int:
        return self.gpu_bytes if compute is Tier.GPU else self.cpu_bytes

    def streamed_bytes(self, compute: Tier) -> int:
        """Bytes that cross a link in each sweep."""
        return self.disk_bytes if compute is Tier.CPU else self.disk_bytes + self.cpu_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One decision for a whole run. The engine executes exactly this or refuses it.

    `kv_bytes` are allocated on `kv_tier`, where attention then runs. `head_split` and
    `embedding_split` are None where the tensor is wholly resident; a tied model's one table is its
    head. What of an embedding is not resident is read row by row, as tokens ask for it.
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
    head_split: Split | None = None
    embedding_split: Split | None = None
    num_slots: int = 2
    """Places for streamed layers on the compute tier: one computes while the others are filled."""

    def __post_init__(self) -> None:
        least = {"block_rows": 1, "sweep_tokens": 1, "micro_batch_tokens": 1, "num_slots": 2}
        for name, least_value in least.items():
            if getattr(self, name) < least_value:
                raise BudgetError(
                    f"a policy's {name} is at least {least_value}, not {getattr(self, name)}"
                )

    @property
    def streamed_bytes(self) -> int:
        """Weight bytes that cross a link in each sweep, without the embedding's rows."""
        head = self.head_split.streamed_bytes(self.compute) if self.head_split else 0
        return head + sum(split.streamed_bytes(self.compute) for split in self.layer_splits)
