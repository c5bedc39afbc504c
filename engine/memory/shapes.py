"""What a model weighs, read off its config and its pack: the planner's figures, no weights."""

from collections.abc import Sequence
from typing import Any

import torch

from engine.context import max_context_tokens
from engine.memory.kv_cache import KVShape
from engine.memory.manifest import PackGroup
from engine.memory.placement import split_groups
from engine.planning.shape import ModelShape


def kv_shapes(config: Any) -> list[KVShape]:
    """Keys and values of each layer's token, as the attention function is handed them."""
    text = config.get_text_config(decoder=True)
    num_heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // num_heads)
    key_size = int(getattr(text, "qk_head_dim", None) or size)
    value_size = int(getattr(text, "v_head_dim", None) or size)
    shape = KVShape(num_heads=kv_heads, key_size=key_size, value_size=value_size)
    return [shape] * int(text.num_hidden_layers)


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
        intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * hidden_size),
        vocab_size=int(text.vocab_size),
        max_context_tokens=max_context_tokens(config),
    )
