"""Attention's arithmetic over views and gathers of the paged cache; knows no model and no sweep."""

import dataclasses
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F

_GATHER_TOKENS: Final = 2**18
"""Cached tokens that one gathered call may copy at once."""

_PAIR_RATIO: Final = 1.5
"""A row is paired with one at most so many times as long: the shorter one's rest is masked."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """New tokens of one row in a micro-batch: `start` in the packing, `past` tokens cached before,
    `slot` where the row's cache begins.
    """

    start: int
    num_tokens: int
    past: int
    slot: int

    @property
    def context(self) -> int:
        return self.past + self.num_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How one layer turns scores into weights."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # (heads,)

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two decoding rows (or one) whose caches one strided view shows, from `slot` on.

    `mask` (rows, 1, 1, length) hides what lies behind the shorter row's end.
    """

    slot: int
    stride_slots: int
    num_rows: int
    length: int
    mask: torch.Tensor | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """How the decoding rows of one micro-batch are paired; `order` (rows,) are their places."""

    order: torch.Tensor
    pairs: tuple[Pair, ...]


def plan_decoding(segments: Sequence[Segment], *, window: int | None, num_slots: int) -> DecodePlan:
    """Pair decoding rows of like length: two rows at any two places are an even stride apart, so
    one call serves both without a copy, and has twice the heads to share among threads.
    """
    spans = sorted(
        (segment.context - first, segment.slot + first, segment.start)
        for segment in segments
        if segment.num_tokens == 1
        for first in [_first_visible(segment, window)]
    )
    pairs, order = [], []
    while spans:
        longest = spans.pop()
        rows = [longest]
        if spans and _may_pair(longest, spans[-1], num_slots):
            rows = sorted([longest, spans.pop()], key=lambda span: span[1])
        pairs.append(_pair(rows, length=longest[0]))
        order += [at for _, _, at in rows]
    return DecodePlan(order=torch.tensor(order, dtype=torch.long), pairs=tuple(pairs))


def _may_pair(longer: tuple[int, int, int], shorter: tuple[int, int, int], num_slots: int) -> bool:
    last_slot = max(longer[1], shorter[1])
    return longer[0] <= _PAIR_RATIO * shorter[0] and last_slot + longer[0] <= num_slots


def _pair(rows: Sequence[tuple[int, int, int]], *, length: int) -> Pair:
    lengths = [row[0] for row in rows]
    mask = None
    if min(lengths) < length:
        mask = (torch.arange(length) < torch.tensor(lengths)[:, None])[:, None, None]
    return Pair(
        slot=rows[0][1],
        stride_slots=rows[-1][1] - rows[0][1],
        num_rows=len(rows),
        length=length,
        mask=mask,
    )


def cut_at_chunks(segments: Sequence[Segment], chunk_tokens: int) -> list[Segment]:
    """The same tokens as segments that each lie in one chunk of their row and see nothing before
    it: attention in chunks is plain attention over these.
    """
    return [
        Segment(
            start=segment.start + first - segment.past,
            num_tokens=min(chunk + chunk_tokens, segment.context) - first,
            past=first - chunk,
            slot=segment.slot + chunk,
        )
        for segment in segments
        for chunk in range(
            segment.past - segment.past % chunk_tokens, segment.context, chunk_tokens
        )
        for first in [max(chunk, segment.past)]
    ]


def attend_views(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    segments: Sequence[Segment],
    head: Head,
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    """Over views of the cache: nothing is copied. For the CPU.

    query (heads, tokens, size), keys and values (kv_heads, slots, size); returns
    (tokens, heads, value_size). With `plan` decoding rows go in pairs, else one by one.
    """
    num_heads, num_tokens, _ = query.shape
    out = query.new_empty(num_tokens, num_heads, values.shape[-1])
    for segment in segments:
        if plan is not None and segment.num_tokens == 1:
            continue
        first = _first_visible(segment, head.window)
        span = slice(segment.slot + first, segment.slot + segment.context)
        at = slice(segment.start, segment.start + segment.num_tokens)
        mask = _segment_mask(segment, first, head.window, query.device)
        answer = _attend(
            query[None, :, at], keys[None, :, span], values[None, :, span], mask=mask, head=head
        )
        out[at] = answer[0].transpose(0, 1)
    if plan is not None and plan.pairs:
        out[plan.order] = _attend_pairs(query[:, plan.order], keys, values, plan=plan, head=head)
    return out


def _attend_pairs(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    plan: DecodePlan,
    head: Head,
) -> torch.Tensor:
    """Query (heads, rows, size) in the plan's order; returns (rows, heads, value_size)."""
    num_heads, num_rows, size = query.shape
    num_kv_heads = keys.shape[0]
    # Query heads of one key head are folded into one call: (rows, kv_heads, group, size).
    folded = query.transpose(0, 1).reshape(num_rows, num_kv_heads, -1, size)
    group = num_heads // num_kv_heads
    out = query.new_empty(num_rows, num_kv_heads, group, values.shape[-1])
    at = 0
    for pair in plan.pairs:
        rows = slice(at, at + pair.num_rows)
        mask = pair.mask
        if mask is not None:
            mask = mask.expand(-1, num_kv_heads, group, -1)
        out[rows] = F.scaled_dot_product_attention(
            folded[rows],
            _pair_view(keys, pair),
            _pair_view(values, pair),
            attn_mask=mask,
            scale=head.scaling,
        )
        at += pair.num_rows
    return out.view(num_rows, num_heads, -1)


def _pair_view(pool: torch.Tensor, pair: Pair) -> torch.Tensor:
    """(rows, kv_heads, length, size) of the pool, which is contiguous."""
    num_kv_heads, num_slots, size = pool.shape
    return pool.as_strided(
        (pair.num_rows, num_kv_heads, pair.length, size),
        (pair.stride_slots * size, num_slots * size, size, 1),
        pair.slot * size,
    )


def attend_gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    segments: Sequence[Segment],
    head: Head,
) -> torch.Tensor:
    """Decoding rows of like length in one call over gathered pages: few launches. For a GPU.

    Shapes as in `attend_views`. Prompt segments go one by one.
    """
    longer = [segment for segment in segments if segment.num_tokens > 1]
    decoding = [segment for segment in segments if segment.num_tokens == 1]
    out = attend_views(query, keys, values, segments=longer, head=head)
    for bucket in _buckets(decoding):
        longest = max(segment.context for segment in bucket)
        columns = torch.arange(longest, device=keys.device)
        lengths = torch.tensor([segment.context for segment in bucket], device=keys.device)
        starts = torch.tensor([segment.slot for segment in bucket], device=keys.device)
        visible = columns < lengths[:, None]
        if head.window is not None:
            visible &= columns >= lengths[:, None] - head.window
        slots = (starts[:, None] + torch.minimum(columns, lengths[:, None] - 1)).view(-1)
        shape = (-1, len(bucket), longest)
        key = keys.index_select(1, slots).view(*(keys.shape[0], *shape[1:], keys.shape[-1]))
        value = values.index_select(1, slots).view(*(values.shape[0], *shape[1:], values.shape[-1]))
        at = torch.tensor([segment.start for segment in bucket], device=query.device)
        rows = query.index_select(1, at).transpose(0, 1).unsqueeze(2)
        answer = _attend(
            rows,
            key.transpose(0, 1),
            value.transpose(0, 1),
            mask=visible[:, None, None],
            head=head,
        )
        out[at] = answer.squeeze(2)
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


def _first_visible(segment: Segment, window: int | None) -> int:
    """The first cached token that any of the segment's tokens may see."""
    return 0 if window is None else max(0, segment.past + 1 - window)


def _segment_mask(
    segment: Segment, first: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """(new tokens, visible context) of what each new token sees; None if all of it."""
    if segment.num_tokens == 1:
        return None
    columns = torch.arange(first, segment.context, device=device)
    rows = torch.arange(segment.past, segment.context, device=device)[:, None]
    visible = columns <= rows
    if window is not None:
        visible &= columns > rows - window
    return visible


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
        if mask is not None and mask.shape[-1] == mask.shape[-2] and head.window is None:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=head.scaling, enable_gqa=group > 1
            )
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=head.scaling, enable_gqa=group > 1
        )
    key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    scores = (query @ key.transpose(-1, -2) * head.scaling).float()
    if head.softcap is not None:
        scores = torch.tanh(scores / head.softcap) * head.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if head.sinks is not None:
        sinks = head.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return weights.to(value.dtype) @ value
