"""The decision as data: which bytes live where, how large the block is, and why; nothing acts here."""

import dataclasses
import enum
from typing import Final, Self

from engine.errors import BudgetError


class Tier(enum.StrEnum):
    """Where bytes live."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Bytes in each tier; of one layer's weights the placeable tensors, in the pack's order.

    A border may lie at any row of a matrix and any expert of a stack. What lies on the compute tier
    is resident; the rest is streamed once a sweep. With the CPU as compute tier `gpu_bytes` is 0
    and `cpu_bytes` is the resident part.
    """

    gpu_bytes: int
    cpu_bytes: int
    disk_bytes: int

    @classmethod
    def on(cls, tier: Tier, num_bytes: int) -> Self:
        """All of them on one tier."""
        return cls(**{f"{each}_bytes": num_bytes if each is tier else 0 for each in Tier})

    def __getitem__(self, tier: Tier) -> int:
        return int(getattr(self, f"{tier}_bytes"))

    @property
    def total_bytes(self) -> int:
        return self.gpu_bytes + self.cpu_bytes + self.disk_bytes

    def resident_bytes(self, compute: Tier) -> int:
        return self.gpu_bytes if compute is Tier.GPU else self.cpu_bytes

    def streamed_bytes(self, compute: Tier) -> int:
        """Bytes that cross a link in each sweep; of experts, at most."""
        return self.disk_bytes if compute is Tier.CPU else self.disk_bytes + self.cpu_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One decision for a whole run. The engine executes exactly this or refuses it.

    `layer_splits` are in stored bytes, as in the pack. `head_split` and `embedding_split` are None
    where the tensor is wholly resident; a tied model's one table is its head. What of an embedding is
    not resident is read row by row, as tokens ask for it.

    `kv` are the bytes that keys and values get on each tier; rows live on the fastest one that has
    room. Those that do not live on the compute tier attend on the CPU beside them where
    `attends_beside` says so, and are fetched otherwise.
    """

    compute: Tier
    compute_dtype: str
    block_rows: int
    sweep_tokens: int
    """Prompt tokens that one sweep may carry beside the decoding rows."""
    micro_batch_tokens: int
    """Tokens of one forward call: bounds activations."""
    kv: Split
    layer_splits: tuple[Split, ...]
    reason: str
    head_split: Split | None = None
    embedding_split: Split | None = None
    num_slots: int = 2
    """Places for streamed units on the compute tier: one computes while the others are filled. Where
    layers come in several units one of them is kept to spare."""
    unit_bytes: int | None = None
    """Streamed bytes of a layer that are fetched at once; None is all of them. A layer that serves
    several micro-batches needs slots for all of its units (`cost.check_budgets`)."""
    attends_beside: bool = True
    fetch_tokens: int = 65536
    """Cached tokens that one micro-batch may bring from another tier."""
    hidden_tier: Tier | None = None
    """Where hidden states lie between layers; None is the compute tier."""
    overlap: bool = True
    """Fetch coming layers while others compute; without, each when it is asked for."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(
            ("block_rows", "sweep_tokens", "micro_batch_tokens", "fetch_tokens"), 1
        )
        least["num_slots"] = 2 if self.unit_bytes is None else 3
        if self.unit_bytes is not None:
            least["unit_bytes"] = 1
        for name, least_value in least.items():
            if getattr(self, name) < least_value:
                raise BudgetError(
                    f"a policy's {name} is at least {least_value}, not {getattr(self, name)}"
                )

    @property
    def may_cut_sweeps(self) -> bool:
        """Whether a sweep may come in several micro-batches: of rows of one tier, so many tokens, and
        so many to fetch.
        """
        away = self.kv.total_bytes - self.kv[self.compute]
        num_tiers = sum(1 for tier in Tier if self.kv[tier])
        fetches = away > 0 and not self.attends_beside
        is_over = self.block_rows + self.sweep_tokens > self.micro_batch_tokens
        return is_over or fetches or num_tiers > 1

    @property
    def streamed_bytes(self) -> int:
        """Weight bytes that cross a link in each sweep, without the embedding's rows.

        For a sweep whose tokens are sent to few experts this is the most: it fetches those alone.
        """
        head = self.head_split.streamed_bytes(self.compute) if self.head_split else 0
        return head + sum(split.streamed_bytes(self.compute) for split in self.layer_splits)


_CHANGED_AT_WORK: Final = frozenset(
    {"block_rows", "sweep_tokens", "micro_batch_tokens", "fetch_tokens", "reason"}
)


def needs_reload(loaded: Policy, wanted: Policy) -> tuple[str, ...]:
    """The fields that differ and decide where bytes lie: an engine has them from its load on."""
    return tuple(
        field.name
        for field in dataclasses.fields(Policy)
        if field.name not in _CHANGED_AT_WORK
        and getattr(loaded, field.name) != getattr(wanted, field.name)
    )
