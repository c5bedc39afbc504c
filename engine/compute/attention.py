"""Attention over the paged KV cache, registered with transformers; every model's layers call it.

It writes the new keys and values of a packed micro-batch to the cache and lets each segment attend
to its own row. Rows, sweeps and weights are others' business.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from engine.errors import UnsupportedModelError
from engine.memory.kv_cache import KVCache

ATTENTION_NAME: Final = "freight"
"""Neutral on purpose: names with sdpa, flash or flex in them trigger checks of the library's own."""

_CONTEXT_ATTRIBUTE: Final = "freight_attention"
_GATHER_TOKENS: Final = 2**18
"""Cached tokens that one gathered call may copy at once."""


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
class Packing:
    """What attention must know of one micro-batch: its segments and the cache slots written."""

    segments: Sequence[Segment]
    slots: torch.Tensor  # (tokens,) on the cache's device


class AttentionContext:
    """Shared by all layers of one model: the cache, and the packing now computing.

    The greenlets of a sweep take turns on one thread; whoever resumes one sets `packing` first.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.packing: Packing | None = None
        self.num_calls = 0


def attach(model: nn.Module, context: AttentionContext) -> None:
    """Let every attention module of `model` find `context`."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, _CONTEXT_ATTRIBUTE, context)


def freight_attention(  # noqa: PLR0917  # the library's signature
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """(1, heads, tokens, size) query, (1, kv_heads, tokens, size) key and value, packed segments;
    returns (1, tokens, heads, value_size). Raises UnsupportedModelError for what it cannot honour.
    """
    context: AttentionContext = getattr(module, _CONTEXT_ATTRIBUTE)
    packing = context.packing
    assert packing is not None, "no micro-batch is computing"
    if options.get("position_bias") is not None or attention_mask is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with a mask or bias of its own"
        )
    context.num_calls += 1
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # a plain int on every attention module
    keys, values = context.cache.layer(layer)
    _require_shape(module, key, value, keys, values)
    home, dtype = query.device, query.dtype
    query, key, value = (each[0].to(keys.device, keys.dtype) for each in (query, key, value))
    keys.index_copy_(1, packing.slots, key)
    values.index_copy_(1, packing.slots, value)
    head = Head(
        scaling=float(options.get("scaling") or query.shape[-1] ** -0.5),
        window=_window(module, options.get("sliding_window")),
        softcap=options.get("softcap"),
        sinks=None if (sinks := options.get("s_aux")) is None else sinks.to(keys.device),
    )
    attend = attend_views if keys.device.type == "cpu" else attend_gathered
    answer = attend(query, keys, values, segments=packing.segments, head=head)
    return answer.to(home, dtype).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, freight_attention)


def _require_shape(
    module: nn.Module, key: torch.Tensor, value: torch.Tensor, *pools: torch.Tensor
) -> None:
    for given, pool in zip((key, value), pools, strict=True):
        if (given.shape[1], given.shape[3]) != (pool.shape[0], pool.shape[2]):
            raise UnsupportedModelError(
                f"{type(module).__name__} attends over {given.shape[1]} heads of {given.shape[3]}, "
                f"its config promises {pool.shape[0]} of {pool.shape[2]}"
            )


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


def _window(module: nn.Module, given: int | None) -> int | None:
    """Most models pass their window; the others say it in their config's layer types only."""
    if given is not None:
        return int(given)
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[int(module.layer_idx)] == "sliding_attention":  # type: ignore[arg-type]
        return int(config.sliding_window)  # type: ignore[union-attr]
    return None


def attend_views(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    segments: Sequence[Segment],
    head: Head,
) -> torch.Tensor:
    """Segment by segment over views of the cache: nothing is copied. For the CPU.

    query (heads, tokens, size), keys and values (kv_heads, slots, size); returns
    (tokens, heads, value_size).
    """
    num_heads, num_tokens, size = query.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    out = query.new_empty(num_tokens, num_heads, values.shape[-1])
    # Decoding rows fold their query heads: (tokens, kv_heads, group, size).
    folded = query.transpose(0, 1).reshape(num_tokens, num_kv_heads, group, size)
    folded_out = out.view(num_tokens, num_kv_heads, group, -1)
    for segment in segments:
        first = _first_visible(segment, head.window)
        span = slice(segment.slot + first, segment.slot + segment.context)
        key, value = keys[None, :, span], values[None, :, span]
        at = segment.start
        if segment.num_tokens == 1 and head.is_plain:
            folded_out[at] = F.scaled_dot_product_attention(
                folded[at : at + 1], key, value, scale=head.scaling
            )[0]
        else:
            rows = query[None, :, at : at + segment.num_tokens]
            mask = _segment_mask(segment, first, head.window, query.device)
            answer = _attend(rows, key, value, mask=mask, head=head)
            out[at : at + segment.num_tokens] = answer[0].transpose(0, 1)
    return out


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
