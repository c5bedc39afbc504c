"""What a model weighs, read off its config and its pack: the planner's figures, no weights."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch

from engine.context import max_context_tokens
from engine.memory.kv_cache import KVShape
from engine.memory.manifest import PackGroup
from engine.memory.placement import split_groups
from engine.planning.shape import ModelShape


def kv_shapes(config: Any) -> list[KVShape]:
    """Keys and values of each layer's token, as the attention function is handed them."""
    text = config.get_text_config(decoder=True)
    # Configs whose layers differ in such figures refuse to give one for all.
    layers = getattr(text, "per_layer_config", None) or [text] * int(text.num_hidden_layers)
    return [_kv_shape(text, layers[index], index) for index in range(int(text.num_hidden_layers))]


def _kv_shape(text: Any, layer: Any, index: int) -> KVShape:
    num_heads = int(layer.num_attention_heads)
    kv_heads = int(getattr(layer, "num_key_value_heads", None) or num_heads)
    size = int(getattr(layer, "head_dim", None) or text.hidden_size // num_heads)
    key_size = int(getattr(layer, "qk_head_dim", None) or size)
    value_size = int(getattr(layer, "v_head_dim", None) or size)
    return KVShape(
        num_heads=_KV_HEADS.get(text.model_type, _as_configured)(text, index, kv_heads),
        key_size=key_size,
        value_size=value_size,
    )


def _as_configured(text: Any, index: int, kv_heads: int) -> int:
    return kv_heads


def _doubled_in_windows(text: Any, index: int, kv_heads: int) -> int:
    return kv_heads * 2 if text.layer_types[index] == "sliding_attention" else kv_heads


def _repeated_for_each_choice(text: Any, index: int, kv_heads: int) -> int:
    return kv_heads * int(text.num_experts_per_tok)


# Types whose modules hand attention other numbers of heads than their configs say.
_KV_HEADS: Final[Mapping[str, Callable[[Any, int, int], int]]] = MappingProxyType(
    {"jetmoe": _repeated_for_each_choice, "mimo_v2_flash": _doubled_in_windows}
)


def model_shape(groups: Sequence[PackGroup], config: Any, *, dtype: torch.dtype) -> ModelShape:
    text = config.get_text_config(decoder=True)
    layers, outer = split_groups(groups)
    itemsizes = {tensor.dtype.itemsize for group in layers for tensor in group.tensors}
    hidden_size = int(text.hidden_size)
    return ModelShape(
        layer_tensor_bytes=tuple(
            tuple(tensor.num_bytes for tensor in group.tensors) for group in layers
        ),
        outer_bytes=sum(tensor.num_bytes for group in outer for tensor in group.tensors),
        stored_itemsize=min(itemsizes),
        compute_itemsize=dtype.itemsize,
        compute_dtype=str(dtype).removeprefix("torch."),
        kv_bytes_per_token=sum(shape.token_bytes(dtype) for shape in kv_shapes(config)),
        hidden_size=hidden_size,
        intermediate_size=_widest(getattr(text, "intermediate_size", None) or 4 * hidden_size),
        vocab_size=int(text.vocab_size),
        max_context_tokens=max_context_tokens(config),
    )


def _widest(sizes: int | Sequence[int]) -> int:
    """Of a size, or of one for each layer."""
    return int(sizes) if isinstance(sizes, int) else max(map(int, sizes))
