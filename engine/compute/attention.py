"""Attention over the paged KV cache, registered with transformers; every model's layers call it.

It reads what a layer asks for and hands it to the route of the tier that the micro-batch's rows live
on. Rows, sweeps and weights are others' business.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers import AttentionInterface

from engine.compute.packing import New, Packing
from engine.compute.routes import Route
from engine.compute.segments import Head, Segment
from engine.errors import UnsupportedModelError
from engine.planning.policy import Tier

ATTENTION_NAME: Final = "freight"
"""Neutral on purpose: names with sdpa, flash or flex in them trigger checks of the library's own."""

_CONTEXT_ATTRIBUTE: Final = "freight_attention"


class AttentionContext:
    """Shared by all layers of one model: the tiers' routes, and the packing now computing.

    The greenlets of a sweep take turns on one thread; whoever resumes one sets `packing` first.
    """

    def __init__(self, routes: Mapping[Tier, Route]) -> None:
        self.routes = dict(routes)
        self.packing: Packing | None = None
        self.num_calls = 0

    def prepare(self, packing: Packing, layer: int) -> None:
        """The packing attends next, or after the step about to run, in what is that layer's for keys
        and values.
        """
        self.routes[packing.tier].prepare(packing, layer)

    def settle(self) -> None:
        for route in self.routes.values():
            route.settle()

    def abandon(self) -> None:
        for route in self.routes.values():
            route.abandon()

    def close(self) -> None:
        for route in self.routes.values():
            route.close()


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
    route = context.routes[packing.tier]
    _require_shape(module, key, value, *route.cache.layer(layer))
    query = _tempered(module, query, packing.segments)
    head = Head(
        scaling=float(options.get("scaling") or query.shape[-1] ** -0.5),
        window=_window(module, options.get("sliding_window")),
        chunk_tokens=_chunk_tokens(module),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    is_kept = route.cache.is_shared(layer)
    new = New(query=query[0], key=key[0], value=value[0], is_kept=is_kept)
    answer = route.attend(new, packing=packing, layer=layer, head=head)
    return answer.unsqueeze(0), None


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


def _tempered(module: nn.Module, query: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """Llama 4 has scaled a query by its place in the forward: let it be by its position instead."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    floor_scale, attn_scale = float(module.floor_scale), float(module.attn_scale)  # type: ignore[arg-type]
    positions = torch.cat([torch.arange(each.past, each.context) for each in segments])
    scales = [
        torch.log1p(torch.floor((at + 1.0) / floor_scale)) * attn_scale + 1.0
        for at in (positions, torch.arange(len(positions)))
    ]
    ratio = (scales[0] / scales[1]).to(query.device)
    return (query * ratio[:, None]).to(query.dtype)


def _window(module: nn.Module, given: int | None) -> int | None:
    """Most models pass their window; the others say it in their config's layer types only."""
    if given is not None:
        return int(given)
    if _kind(module) == "sliding_attention":
        return int(module.config.sliding_window)  # type: ignore[union-attr,arg-type]
    return None


def _chunk_tokens(module: nn.Module) -> int | None:
    """Of a layer that attends within chunks only, their size: the library says it in a mask."""
    if _kind(module) == "chunked_attention":
        return int(module.config.attention_chunk_size)  # type: ignore[union-attr,arg-type]
    return None


def _kind(module: nn.Module) -> str | None:
    """What the module's config says of its layer."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    return kinds[int(module.layer_idx)] if kinds else None  # type: ignore[arg-type]
