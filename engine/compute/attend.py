"""Attention's arithmetic over views of the paged cache, copying nothing: for the CPU.

A token's context may lie in several spans (a shared prefix, the row's own): each is attended to
apart, and the answers are merged by their log-sum-exp. Knows no model and no sweep.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final

import torch

from engine.compute.lookup import Lookup, Seen, plan_lookups, suits_lookup
from engine.compute.segments import Head, Segment, Span

_FLASH: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
"""What `F.scaled_dot_product_attention` calls on a CPU; asked directly it gives the sums as well."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One call: `tokens` of the packing over `length` slots from `slot` on.

    `mask` (tokens, length) is added to the scores: 0 where a token may look, -inf elsewhere; None if
    it may look everywhere. With `is_causal` the tokens are themselves the last of those slots, and
    see as far as themselves.
    """

    tokens: slice | torch.Tensor
    slot: int
    length: int
    mask: torch.Tensor | None = None
    is_causal: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """The calls that one micro-batch needs in every layer of one window.

    `decoding` are rows with one new token, which see what it says of their own tokens; `own` serve
    the other rows' own; `shared` adds what prefixes contribute to both, one call for all that share.
    """

    decoding: tuple[Seen, ...]
    own: tuple[Part, ...]
    shared: tuple[Part, ...]
    _lookups: dict[tuple[int, torch.Size], tuple[Lookup, ...]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    def lookups(self, num_heads: int, keys: torch.Tensor) -> tuple[Lookup, ...]:
        """For the decoding rows; the same for every layer of one shape."""
        shape = (num_heads, keys.shape)
        if shape not in self._lookups:
            self._lookups[shape] = plan_lookups(self.decoding, num_heads=num_heads, keys=keys)
        return self._lookups[shape]


def plan_attention(
    segments: Sequence[Segment], *, window: int | None, dtype: torch.dtype
) -> AttentionPlan:
    """For queries of that dtype. Made once a micro-batch, used by all layers of one window."""
    own = (_own_part(segment, window) for segment in segments if segment.num_tokens > 1)
    return AttentionPlan(
        decoding=tuple(
            (segment.start, _own_visible(segment, window))
            for segment in segments
            if segment.num_tokens == 1
        ),
        own=tuple(_with_additive_mask(part, dtype) for part in own),
        shared=tuple(_with_additive_mask(part, dtype) for part in _shared_parts(segments, window)),
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    plan: AttentionPlan,
    head: Head,
) -> torch.Tensor:
    """`query` (heads, tokens, size), keys and values (kv_heads, slots, size), the pool of a layer;
    returns (tokens, heads, value_size).
    """
    num_heads, num_tokens, _ = query.shape
    out = query.new_empty(num_tokens, num_heads, values.shape[-1])
    merges = bool(plan.shared) or head.sinks is not None
    # Averages may be kept in 16 bits, but not what they are weighted by.
    summed = torch.promote_types(query.dtype, torch.float32)
    sums = query.new_empty(num_tokens, num_heads, dtype=summed) if merges else None
    looks_up = suits_lookup(num_heads, keys)
    for lookup in plan.lookups(num_heads, keys) if looks_up else ():
        rows = query[:, lookup.tokens].transpose(0, 1)
        answer, total = lookup.attend(rows, keys, values, head=head, wants_sums=merges)
        out[lookup.tokens] = answer
        if sums is not None and total is not None:
            sums[lookup.tokens] = total
    for part in plan.own if looks_up else (*plan.own, *map(_row_part, plan.decoding)):
        answer, total = _attend_part(query, keys, values, part=part, head=head)
        out[part.tokens] = answer
        if sums is not None:
            sums[part.tokens] = total
    if sums is not None:
        for part in plan.shared:
            answer, total = _attend_part(query, keys, values, part=part, head=head)
            _merge(out, sums, part=part, answer=answer, total=total)
        if head.sinks is not None:
            out *= torch.sigmoid(sums - head.sinks.to(sums.dtype))[..., None].to(out.dtype)
    return out


def _merge(
    out: torch.Tensor,
    sums: torch.Tensor,
    *,
    part: Part,
    answer: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Fold a partial answer in: both are averages, weighted by the exponents of their sums."""
    before = sums[part.tokens]
    share = torch.sigmoid(total - before)[..., None].to(out.dtype)
    out[part.tokens] = torch.lerp(out[part.tokens], answer, share)
    sums[part.tokens] = torch.logaddexp(before, total)


# -- the calls ---------------------------------------------------------------------------------


def _attend_part(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, part: Part, head: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, heads, value_size) and the log-sum-exp of their scores, (tokens, heads)."""
    span = slice(part.slot, part.slot + part.length)
    answer, total = _partial(
        query[None, :, part.tokens],
        keys[None, :, span],
        values[None, :, span],
        mask=part.mask,
        is_causal=part.is_causal,
        head=head,
    )
    return answer[0].transpose(0, 1), total[0].transpose(0, 1)


def _has_kernel(keys: torch.Tensor, values: torch.Tensor, head: Head) -> bool:
    return head.softcap is None and keys.shape[-1] == values.shape[-1]


def _partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    is_causal: bool,
    head: Head,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, heads, new, size) over (rows, kv_heads, length, size): the answer in that shape, and
    the log-sum-exp of the scores (rows, heads, new).
    """
    rows, num_heads, new, size = query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    if is_causal and group > 1:
        key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
        num_kv_heads, group = num_heads, 1
    # Query heads of one key head are folded into one call: its keys are read once for all of them.
    query = query.reshape(rows, num_kv_heads, group * new, size)
    if mask is not None:
        shape = (rows, num_kv_heads, group, -1)
        mask = mask.expand(shape) if new == 1 else _fold(mask, group)
    if _has_kernel(key, value, head):
        answer, total = _FLASH(
            query,
            key,
            value,
            is_causal=is_causal,
            attn_mask=mask,
            scale=head.scaling,
        )
    else:
        answer, total = _written_out(query, key, value, mask=mask, is_causal=is_causal, head=head)
    return (
        answer.reshape(rows, num_heads, new, -1),
        total.reshape(rows, num_heads, new),
    )


def _fold(mask: torch.Tensor, group: int) -> torch.Tensor:
    """(..., new, length) for `group` query heads folded into one: (..., group * new, length)."""
    *outer, new, length = mask.shape
    return (
        mask.unsqueeze(-3).expand(*outer, group, new, length).reshape(*outer, group * new, length)
    )


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    head: Head,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel cannot do, with scores in float32 at least."""
    scores = query @ key.transpose(-1, -2) * head.scaling
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if head.softcap is not None:
        scores = torch.tanh(scores / head.softcap) * head.softcap
    if is_causal:
        mask = _additive(torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), scores.dtype)
    if mask is not None:
        scores = scores + mask
    total = scores.logsumexp(dim=-1)
    return (scores - total[..., None]).exp().to(value.dtype) @ value, total


# -- planning ----------------------------------------------------------------------------------


def _with_additive_mask(part: Part, dtype: torch.dtype) -> Part:
    """Up to here masks say where a token may look."""
    if part.mask is None:
        return part
    return dataclasses.replace(part, mask=_additive(part.mask, dtype))


def _own_visible(segment: Segment, window: int | None) -> Span:
    """What a decoding row sees of its own tokens."""
    own = segment.own
    first = max(segment.first_visible(window), own.start)
    return Span(own.slot + first - own.start, first, segment.context - first)


def _row_part(row: Seen) -> Part:
    token, span = row
    return Part(tokens=slice(token, token + 1), slot=span.slot, length=span.num_tokens)


def _own_part(segment: Segment, window: int | None) -> Part:
    own = segment.own
    first = max(segment.first_visible(window), own.start)
    is_causal = first == segment.past and (window is None or window >= segment.num_tokens)
    return Part(
        tokens=slice(segment.start, segment.start + segment.num_tokens),
        slot=own.slot + first - own.start,
        length=segment.context - first,
        mask=None if is_causal else _visible(segment, first, segment.context, window),
        is_causal=is_causal,
    )


def _shared_parts(segments: Sequence[Segment], window: int | None) -> tuple[Part, ...]:
    """One call a span, for all tokens whose rows share it and which may see any of it."""
    users: dict[Span, list[Segment]] = {}
    for segment in segments:
        for span in segment.prefix:
            users.setdefault(span, []).append(segment)
    parts = (_shared_part(span, sharing, window) for span, sharing in users.items())
    return tuple(part for part in parts if part is not None)


def _shared_part(span: Span, segments: Sequence[Segment], window: int | None) -> Part | None:
    positions = torch.cat([torch.arange(s.past, s.context) for s in segments])
    tokens = torch.cat([torch.arange(s.start, s.start + s.num_tokens) for s in segments])
    first, mask = span.start, None
    if window is not None:
        seen = positions - window < span.end - 1
        positions, tokens = positions[seen], tokens[seen]
        if not len(tokens):
            return None
        first = max(first, int(positions.min()) + 1 - window)
        mask = torch.arange(first, span.end) > (positions - window)[:, None]
        mask = None if bool(mask.all()) else mask
    return Part(
        tokens=tokens, slot=span.slot + first - span.start, length=span.end - first, mask=mask
    )


def _visible(segment: Segment, first: int, end: int, window: int | None) -> torch.Tensor:
    """(new tokens, positions from first to end): which position each new token sees."""
    columns = torch.arange(first, end)
    rows = torch.arange(segment.past, segment.context)[:, None]
    visible = columns <= rows
    if window is not None:
        visible &= columns > rows - window
    return visible
