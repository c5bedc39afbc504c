"""One micro-batch as attention sees it, and attention over one pool of keys and values."""

import dataclasses
from collections.abc import Sequence

import torch

from engine.compute.attend import AttentionPlan, attend, plan_attention
from engine.compute.gather import GATHER_BYTES, Bucket, attend_gathered, plan_gathering
from engine.compute.segments import Head, Segment, cut_at_chunks
from engine.planning.flops import Attended, attended
from engine.planning.policy import Tier


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packing:
    """Segments of rows that live on one tier, and the slots (tokens,) their new tokens go to.

    `num_slots` is the pool's length; `slots` lie on the pool's device.
    """

    tier: Tier
    segments: Sequence[Segment]
    slots: torch.Tensor
    num_slots: int
    _attended: dict[int | None, Attended] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )
    _cuts: dict[int, "Packing"] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _view_plans: dict[int | None, AttentionPlan] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )
    _gather_plans: dict[tuple[int | None, int], tuple[Bucket, ...]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    def cut(self, chunk_tokens: int) -> "Packing":
        """Its segments cut where chunks of the rows begin; the same for every layer of one size."""
        if chunk_tokens not in self._cuts:
            segments = cut_at_chunks(self.segments, chunk_tokens)
            self._cuts[chunk_tokens] = dataclasses.replace(self, segments=segments)
        return self._cuts[chunk_tokens]

    def attended(self, window: int | None) -> Attended:
        """What there is to compute in a layer of that window, counted once."""
        if window not in self._attended:
            lengths = [(segment.num_tokens, segment.past) for segment in self.segments]
            self._attended[window] = attended(lengths, window=window)
        return self._attended[window]

    def view_plan(self, window: int | None, dtype: torch.dtype) -> AttentionPlan:
        """The same for every layer of one window, so made once."""
        if window not in self._view_plans:
            self._view_plans[window] = plan_attention(self.segments, window=window, dtype=dtype)
        return self._view_plans[window]

    def gather_plan(self, window: int | None, token_bytes: int) -> tuple[Bucket, ...]:
        """Likewise, for a GPU; `token_bytes` of a token's keys and values in such a layer."""
        key = (window, token_bytes)
        if key not in self._gather_plans:
            self._gather_plans[key] = plan_gathering(
                self.segments,
                window=window,
                most_tokens=GATHER_BYTES // token_bytes,
                device=self.slots.device,
            )
        return self._gather_plans[key]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """What a layer computed for the new tokens of a micro-batch.

    `query` (heads, tokens, size), `key` and `value` (kv_heads, tokens, size). `is_kept`: an earlier
    layer has computed these keys and values and written them to the pool that both share.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    is_kept: bool = False

    def to(self, device: torch.device, dtype: torch.dtype) -> "New":
        """A copy from a GPU may still be under way when this returns."""
        moved = (
            each.to(device, dtype, non_blocking=True) for each in (self.query, self.key, self.value)
        )
        query, key, value = moved
        return New(query=query, key=key, value=value, is_kept=self.is_kept)


def write_and_attend(
    pool: tuple[torch.Tensor, torch.Tensor], new: New, *, packing: Packing, head: Head
) -> torch.Tensor:
    """Write the new keys and values to the pool, unless they are there, and attend over it;
    (tokens, heads, value_size).

    `pool` are a layer's keys and values, `new` lies on their device.
    """
    keys, values = pool
    if not new.is_kept:
        keys.index_copy_(1, packing.slots, new.key)
        values.index_copy_(1, packing.slots, new.value)
    if head.chunk_tokens is not None:
        packing = packing.cut(head.chunk_tokens)
    if head.sinks is not None:
        head = dataclasses.replace(head, sinks=head.sinks.to(keys.device))
    if keys.device.type == "cpu":
        plan = packing.view_plan(head.window, keys.dtype)
        return attend(new.query, keys, values, plan=plan, head=head)
    token_bytes = sum(pool.shape[0] * pool.shape[2] * pool.itemsize for pool in (keys, values))
    buckets = packing.gather_plan(head.window, token_bytes)
    return attend_gathered(new.query, keys, values, plan=buckets, head=head)
