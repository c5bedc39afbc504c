"""Attention over the paged KV cache, registered with transformers; every model's layers call it.

It writes the new keys and values of a packed micro-batch to the cache and lets each segment attend
to its own row. Rows, sweeps and weights are others' business.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers import AttentionInterface

from engine.compute.attend import (
    DecodePlan,
    Head,
    Segment,
    attend_gathered,
    attend_views,
    plan_decoding,
)
from engine.errors import UnsupportedModelError
from engine.memory.kv_cache import KVCache

ATTENTION_NAME: Final = "freight"
"""Neutral on purpose: names with sdpa, flash or flex in them trigger checks of the library's own."""

_CONTEXT_ATTRIBUTE: Final = "freight_attention"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What attention must know of one micro-batch: its segments and the cache slots written."""

    segments: Sequence[Segment]
    slots: torch.Tensor  # (tokens,) on the cache's device
    _plans: dict[int | None, DecodePlan] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    def decode_plan(self, *, window: int | None, num_slots: int) -> DecodePlan:
        """The same for every layer of one window, so made once."""
        if window not in self._plans:
            self._plans[window] = plan_decoding(self.segments, window=window, num_slots=num_slots)
        return self._plans[window]


class AttentionContext:
    """Shared by all layers of one model: the cache, and the packing now computing.

    The greenlets of a sweep take turns on one thread; whoever resumes one sets `packing` first.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.packing: Packing | None = None
        self.num_calls = 0
        self.attended_s: tuple[float, float] | None = None
        """When the last call began and ended; of a CPU's calls only, a GPU's are not done by then."""


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
    started_s = time.perf_counter()
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
    if keys.device.type != "cpu":
        answer = attend_gathered(query, keys, values, segments=packing.segments, head=head)
    else:
        plan = None
        if head.is_plain:
            plan = packing.decode_plan(window=head.window, num_slots=keys.shape[1])
        answer = attend_views(query, keys, values, segments=packing.segments, head=head, plan=plan)
        context.attended_s = (started_s, time.perf_counter())
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


def _window(module: nn.Module, given: int | None) -> int | None:
    """Most models pass their window; the others say it in their config's layer types only."""
    if given is not None:
        return int(given)
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[int(module.layer_idx)] == "sliding_attention":  # type: ignore[arg-type]
        return int(config.sliding_window)  # type: ignore[union-attr]
    return None
