"""Attention's arithmetic over gathered pages of the cache: few launches, for a GPU.

Decoding rows of like length share one call. Knows no model and no sweep.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F

from engine.compute.segments import Head, Segment

GATHER_BYTES: Final = 64 * 2**20
"""Keys and values that one call copies at once: of several rows, or of one that sees more."""

_SCORE_BYTES: Final = 64 * 2**20
"""Scores that are written out at once, of one new token at least."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Rows of one call: `slots` (rows * length,) of what they see, padded by repeating the last.

    `tokens` (rows * new,) are their places in the packing; `visible` (rows, 1, new, length) is True
    where a token may look, None where the new tokens are the whole context: plainly causal.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    visible: torch.Tensor | None
    num_rows: int
    length: int


def plan_gathering(
    segments: Sequence[Segment], *, window: int | None, most_tokens: int, device: torch.device
) -> tuple[Bucket, ...]:
    """With at most so many cached tokens in a call for several rows. Made once a micro-batch, used by
    all layers of one window.
    """
    longer = [[segment] for segment in segments if segment.num_tokens > 1]
    decoding = [segment for segment in segments if segment.num_tokens == 1]
    together = _buckets(decoding, window, most_tokens)
    return tuple(_bucket(rows, window, device) for rows in (*longer, *together))


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


def _num_seen(segment: Segment, window: int | None) -> int:
    return segment.context - segment.first_visible(window)


def _buckets(
    decoding: Sequence[Segment], window: int | None, most_tokens: int
) -> list[list[Segment]]:
    """Segments by what they see, cut so that padding and the gathered copy stay small."""
    buckets: list[list[Segment]] = []
    for segment in sorted(decoding, key=lambda segment: _num_seen(segment, window)):
        bucket = buckets[-1] if buckets else []
        length = _num_seen(segment, window)
        fits = (len(bucket) + 1) * length <= most_tokens
        if bucket and fits and length <= 2 * _num_seen(bucket[0], window) + 64:
            bucket.append(segment)
        else:
            buckets.append([segment])
    return buckets


def _bucket(rows: Sequence[Segment], window: int | None, device: torch.device) -> Bucket:
    """Rows with equally many new tokens. Built on the CPU and sent over in one go each."""
    longest = max(_num_seen(segment, window) for segment in rows)
    columns = torch.arange(longest)
    slots, visible, tokens = [], [], []
    for segment in rows:
        places = segment.first_visible(window) + columns
        slots.append(_slots_of(segment)[places.clamp(max=segment.context - 1)])
        positions = torch.arange(segment.past, segment.context)[:, None]
        seen = places <= positions
        if window is not None:
            seen &= places > positions - window
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
    """(rows, heads, new, size) over (rows, kv_heads, context, size), in the query's shape.

    torch's kernels that hold no matrix of scores take a mask or groups of query heads and, on most
    GPUs, not both: what is asked for with both is written out, with copies of all keys. So query
    heads of one key head are folded into one, with as many more tokens.
    """
    rows, num_heads, new, size = query.shape
    group = num_heads // key.shape[1]
    if mask is None and head.is_plain:
        key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=head.scaling)
    if mask is None:
        mask = torch.ones(1, 1, new, new, dtype=torch.bool, device=query.device).tril()
    folded = query.reshape(rows, -1, group * new, size)
    mask = mask.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3)
    if head.is_plain:
        answer = F.scaled_dot_product_attention(
            folded, key, value, attn_mask=mask, scale=head.scaling
        )
    else:
        answer = _written_out(folded, key, value, mask=mask, head=head, new=new)
    return answer.reshape(rows, num_heads, new, -1)


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor,
    head: Head,
    new: int,
) -> torch.Tensor:
    """What no kernel can do, some tokens at a time, with scores in float32. Queries are folded: of
    each key head `new` tokens of one query head after the other.
    """
    rows, kv_heads, num_queries, _ = query.shape
    sinks = None
    if head.sinks is not None:
        sinks = head.sinks.float().repeat_interleave(new).view(kv_heads, num_queries, 1)
    step = max(1, _SCORE_BYTES // (4 * rows * kv_heads * key.shape[2]))
    answers = []
    for some in (slice(first, first + step) for first in range(0, num_queries, step)):
        scores = (query[:, :, some] @ key.transpose(-1, -2) * head.scaling).float()
        if head.softcap is not None:
            scores = torch.tanh(scores / head.softcap) * head.softcap
        scores = scores.masked_fill(~mask[:, :, some], float("-inf"))
        if sinks is None:
            weights = scores.softmax(dim=-1)
        else:
            sunk = sinks[:, some].expand(rows, -1, -1, -1)
            weights = torch.cat([scores, sunk], dim=-1).softmax(dim=-1)[..., :-1]
        answers.append(weights.to(value.dtype) @ value)
    return torch.cat(answers, dim=2)
