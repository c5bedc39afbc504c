"""What a model weighs, read off its config and its pack: the planner's figures, no weights."""

from collections.abc import Sequence
from math import prod
from typing import Any, Final

import torch

from engine.context import max_context_tokens
from engine.memory.kv_cache import KVShape
from engine.memory.manifest import PackGroup
from engine.memory.placement import split_groups
from engine.planning.flops import Work
from engine.planning.shape import ModelShape

_NUM_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_NUM_CHOSEN: Final = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
"""What configs call the number of a layer's experts, and of those that one token is sent to."""


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


def model_work(groups: Sequence[PackGroup], config: Any, *, dtype: torch.dtype) -> Work:
    """What a token costs, off the layers' tensors: every matrix, of the experts the chosen ones."""
    text = config.get_text_config(decoder=True)
    layers, _ = split_groups(groups)
    kv = kv_shapes(config)[0]
    return Work(
        matrix_elements=tuple(
            sum(_met_elements(tensor.shape, text) for tensor in group.tensors) for group in layers
        ),
        windows=_windows(text, len(layers)),
        num_heads=int(text.num_attention_heads),
        key_size=kv.key_size,
        value_size=kv.value_size,
        kv_bytes_per_token=kv.token_bytes(dtype),
        head_elements=int(text.vocab_size) * int(text.hidden_size),
    )


def largest_matrix(groups: Sequence[PackGroup]) -> tuple[int, int]:
    """(rows, columns) of the largest matrix of any layer; of fused experts one expert's."""
    layers, _ = split_groups(groups)
    shapes = [tensor.shape[-2:] for group in layers for tensor in group.tensors]
    rows, columns = max((shape for shape in shapes if len(shape) == 2), key=prod)
    return rows, columns


def _met_elements(shape: tuple[int, ...], text: Any) -> int:
    if len(shape) < 2:
        return 0  # norms and biases
    num_chosen = _first_count(text, _NUM_CHOSEN)
    if len(shape) == 3 and shape[0] == _first_count(text, _NUM_EXPERTS) and num_chosen:
        return num_chosen * prod(shape[1:])
    return prod(shape)


def _first_count(text: Any, names: Sequence[str]) -> int | None:
    found = (getattr(text, name, None) for name in names)
    return next((count for count in found if isinstance(count, int)), None)


def _windows(text: Any, num_layers: int) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * num_layers
    if not isinstance(window, int) or window < 1 or len(kinds) != num_layers:
        return (None,) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
