"""Attention's arithmetic over gathered pages of the cache: few launches, for a GPU.

Decoding rows of like length share one call. Knows no model and no sweep.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F

from engine.compute.segments import Head, Segment

_GATHER_TOKENS: Final = 2**18
"""Cached tokens that one gathered call may copy at once."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Rows of one call: `slots` (rows * length,) of their contexts, padded by repeating the last.

    `tokens` (rows * new,) are their places in the packing; `visible` (rows, 1, new, length) is True
    where a token may look, None where the new tokens are the whole context: plainly causal.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    visible: torch.Tensor | None
    num_rows: int
    length: int


def plan_gathering(
    segments: Sequence[Segment], *, window: int | None, device: torch.device
) -> tuple[Bucket, ...]:
    """Made once a micro-batch, used by all layers of one window."""
    longer = [[segment] for segment in segments if segment.num_tokens > 1]
    decoding = [segment for segment in segments if segment.num_tokens == 1]
    return tuple(_bucket(rows, window, device) for rows in (*longer, *_buckets(decoding)))


def attend_gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    plan: Sequence[Bucket],
    head: Head,
) -> torch.Tensor:
    """`query` (heads, tokens, size), keys and values (kv_heads, slots, size), the pool of a layer;
    returns (tokens, heads, value_size).
    """
    num_heads, num_tokens, size = query.shape
    out = query.new_empty(num_tokens, num_heads, values.shape[-1])
    for bucket in plan:
        shape = (-1, bucket.num_rows, bucket.length)
        key, value = (
            pool.index_select(1, bucket.slots).view(pool.shape[0], *shape[1:], pool.shape[-1])
            for pool in (keys, values)
        )
        rows = query.index_select(1, bucket.tokens).view(num_heads, bucket.num_rows, -1, size)
        answer = _attend(
            rows.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            mask=bucket.visible,
            head=head,
        )
        out[bucket.tokens] = answer.transpose(1, 2).reshape(-1, num_heads, values.shape[-1])
    return out


def _buckets(decoding: Sequence[Segment]) -> list[list[Segment]]:
    """Segments by length, cut so that padding and the gathered copy stay small."""
    buckets: list[list[Segment]] = []
    for segment in sorted(decoding, key=lambda segment: segment.context):
        bucket = buckets[-1] if buckets else []
        fits = (len(bucket) + 1) * segment.context <= _GATHER_TOKENS
        if bucket and fits and segment.context <= 2 * bucket[0].context + 64:
            bucket.append(segment)
        else:
            buckets.append([segment])
    return buckets


def _bucket(rows: Sequence[Segment], window: int | None, device: torch.device) -> Bucket:
    """Rows with equally many new tokens. Built on the CPU and sent over in one go each."""
    longest = max(segment.context for segment in rows)
    columns = torch.arange(longest)
    slots, visible, tokens = [], [], []
    for segment in rows:
        slots.append(_slots_of(segment)[columns.clamp(max=segment.context - 1)])
        positions = torch.arange(segment.past, segment.context)[:, None]
        seen = columns <= positions
        if window is not None:
            seen &= columns > positions - window
        visible.append(seen)
        tokens.append(torch.arange(segment.start, segment.start + segment.num_tokens))
    is_causal = len(rows) == 1 and rows[0].past == 0 and (window is None or window >= longest)
    return Bucket(
        tokens=torch.cat(tokens).to(device),
        slots=torch.cat(slots).to(device),
        visible=None if is_causal else torch.stack(visible)[:, None].to(device),
        num_rows=len(rows),
        length=longest,
    )


def _slots_of(segment: Segment) -> torch.Tensor:
    return torch.cat(
        [torch.arange(span.slot, span.slot + span.num_tokens) for span in segment.spans]
    )


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    head: Head,
) -> torch.Tensor:
    """(rows, heads, new, size) over (rows, kv_heads, context, size); scores in float32 where the
    library's own kernel cannot do what the layer asks.
    """
    group = query.shape[1] // key.shape[1]
    if head.is_plain:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=head.scaling,
            enable_gqa=group > 1,
        )
    key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    scores = (query @ key.transpose(-1, -2) * head.scaling).float()
    if head.softcap is not None:
        scores = torch.tanh(scores / head.softcap) * head.softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if head.sinks is not None:
        sinks = head.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return weights.to(value.dtype) @ value
