"""What a model weighs, read off its config and its pack: the planner's figures, no weights."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch

from engine.context import max_context_tokens
from engine.memory.kinds import Kind
from engine.memory.kv_cache import KVShape
from engine.memory.layout import lay_out
from engine.memory.manifest import PackedTensor, PackGroup
from engine.memory.placement import rows_of, split_groups
from engine.planning.flops import Work
from engine.planning.shape import ModelShape, Placeable

_GRANULE_ROWS: Final = 16
"""Rows that planners cut matrices by: kernels compute in blocks of no more."""

_LOGIT_SCALES: Final = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config fields of models that work on their logits before they give them."""

_NUM_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_NUM_CHOSEN: Final = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
"""What configs call the number of a layer's experts, and of those that one token is sent to."""


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
        owner=_kv_owner(text, index),
    )


def _kv_owner(text: Any, index: int) -> int | None:
    """Of a layer that attends over an earlier one's keys and values: the last of its kind that
    computes any.
    """
    modes = getattr(text, "kv_sharing_modes", None) if text.model_type in _SHARING else None
    if modes is None or modes[index] != "reuse":
        return None
    kinds = text.layer_types
    return max(at for at in range(index) if modes[at] == "store" and kinds[at] == kinds[index])


def _as_configured(text: Any, index: int, kv_heads: int) -> int:
    return kv_heads


def _doubled_in_windows(text: Any, index: int, kv_heads: int) -> int:
    return kv_heads * 2 if text.layer_types[index] == "sliding_attention" else kv_heads


def _repeated_for_each_choice(text: Any, index: int, kv_heads: int) -> int:
    return kv_heads * int(text.num_experts_per_tok)


# Types whose later layers hand attention the very keys and values of an earlier one of their kind.
_SHARING: Final = frozenset({"gemma3n_text", "gemma4_text", "gemma4_unified_text"})

# Types whose modules hand attention other numbers of heads than their configs say.
_KV_HEADS: Final[Mapping[str, Callable[[Any, int, int], int]]] = MappingProxyType(
    {"jetmoe": _repeated_for_each_choice, "mimo_v2_flash": _doubled_in_windows}
)


def model_shape(
    groups: Sequence[PackGroup], model: Any, config: Any, *, dtype: torch.dtype
) -> ModelShape:
    """Of a checkpoint's planned groups and the skeleton that they are for."""
    text = config.get_text_config(decoder=True)
    layers, outer = split_groups(groups)
    kinds = lay_out(model).kinds
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    every = [tensor for group in (*layers, *outer) for tensor in group.tensors]
    outside = {
        kinds[tensor.name]: _placeable(tensor, kinds[tensor.name], dtypes[tensor.name])
        for group in outer
        for tensor in group.tensors
    }
    hidden_size = int(text.hidden_size)
    lookup_bytes, widened_bytes = _looked_up_bytes(config, dtype)
    return ModelShape(
        layers=tuple(_placed(group, kinds, dtypes) for group in layers),
        fixed_bytes=sum(
            math.prod(tensor.shape) * dtypes[tensor.name].itemsize
            for tensor in every
            if kinds[tensor.name] is Kind.FIXED
        ),
        embedding=outside.get(Kind.TABLE),
        head=outside.get(Kind.HEAD) or outside.get(Kind.TIED_HEAD),
        tied=Kind.TIED_HEAD in outside,
        scales_logits=any(getattr(text, name, None) for name in _LOGIT_SCALES),
        compute_dtype=str(dtype).removeprefix("torch."),
        compute_itemsize=dtype.itemsize,
        kv_bytes_per_token=sum(shape.token_bytes(dtype) for shape in kv_shapes(config)),
        kv_layer_bytes_per_token=max(shape.token_bytes(dtype) for shape in kv_shapes(config)),
        lookup_bytes_per_token=lookup_bytes,
        widened_bytes_per_token=widened_bytes,
        hidden_size=hidden_size,
        intermediate_size=_widest(getattr(text, "intermediate_size", None) or 4 * hidden_size),
        vocab_size=int(text.vocab_size),
        max_context_tokens=max_context_tokens(config),
    )


def _placed(
    group: PackGroup, kinds: Mapping[str, Kind], dtypes: Mapping[str, torch.dtype]
) -> tuple[Placeable, ...]:
    """A layer's placeable tensors, each with its distance to the next."""
    tensors = [tensor for tensor in group.tensors if kinds[tensor.name] is not Kind.FIXED]
    starts = [tensor.offset_bytes for tensor in tensors[1:]]
    ends = [tensor.offset_bytes + tensor.num_bytes for tensor in tensors]
    gaps = [start - end for start, end in zip([*starts, *ends[-1:]], ends, strict=True)]
    return tuple(
        dataclasses.replace(
            _placeable(tensor, kinds[tensor.name], dtypes[tensor.name]), gap_bytes=gap
        )
        for tensor, gap in zip(tensors, gaps, strict=True)
    )


def _placeable(tensor: PackedTensor, kind: Kind, dtype: torch.dtype) -> Placeable:
    num_rows = rows_of(tensor, kind)
    by_row = kind not in {Kind.WHOLE, Kind.STACK}
    row_bytes = tensor.num_bytes // num_rows
    converted = kind is Kind.WHOLE and tensor.dtype != dtype
    return Placeable(
        num_bytes=tensor.num_bytes,
        granule_bytes=min(tensor.num_bytes, row_bytes * (_GRANULE_ROWS if by_row else 1)),
        unpacked_bytes=math.prod(tensor.shape) * dtype.itemsize if converted else 0,
        is_whole=kind is Kind.WHOLE,
        is_stack=kind is Kind.STACK,
        row_bytes=row_bytes if by_row else 0,
        stored_dtype=None if tensor.dtype == dtype else str(tensor.dtype).removeprefix("torch."),
    )


def _looked_up_bytes(config: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Of a cached token, for a CPU (`engine/compute/lookup.py`): of tables for every kind of layers
    that look at a cache alike, a place and a score of each head, for keys of 16 bits a second place;
    and of one layer, such keys as float32 and a weight of each head.
    """
    text = config.get_text_config(decoder=True)
    every = kv_shapes(config)
    layers = getattr(text, "per_layer_config", None) or [text] * len(every)
    kinds = getattr(text, "layer_types", None) or [None] * len(every)
    windows = _windows(text, len(every))
    alike = {
        (kind, window, max(int(layer.num_attention_heads), shape.num_heads), shape.num_heads, size)
        for kind, window, layer, shape in zip(kinds, windows, layers, every, strict=True)
        for size in [shape.key_size]
    }
    is_16_bit = dtype.itemsize < torch.float32.itemsize
    element_bytes = torch.float32.itemsize + torch.int32.itemsize * (2 if is_16_bit else 1)
    tables = sum(num_heads * element_bytes for _, _, num_heads, _, _ in alike)
    widened = max(
        kv_heads * size * torch.float32.itemsize + num_heads * dtype.itemsize
        for _, _, num_heads, kv_heads, size in alike
    )
    return tables, widened if is_16_bit else 0


def _widest(sizes: int | Sequence[int]) -> int:
    """Of a size, or of one for each layer."""
    return int(sizes) if isinstance(sizes, int) else max(map(int, sizes))


def model_work(groups: Sequence[PackGroup], config: Any, *, dtype: torch.dtype) -> Work:
    """What a token costs, off the layers' tensors: every matrix, of the experts the chosen ones."""
    text = config.get_text_config(decoder=True)
    layers, _ = split_groups(groups)
    every_kv = kv_shapes(config)
    kv = every_kv[0]
    stacks = [[each for each in group.tensors if _is_stack(each.shape, text)] for group in layers]
    return Work(
        matrix_elements=tuple(
            sum(_met_elements(tensor.shape, text) for tensor in group.tensors) for group in layers
        ),
        expert_elements=tuple(
            sum(_met_elements(tensor.shape, text) for tensor in each) for each in stacks
        ),
        expert_share=_expert_share(text) if any(stacks) else 1.0,
        layer_values=tuple(
            sum(_met_values(tensor.shape, text) for tensor in group.tensors) for group in layers
        ),
        layer_products=tuple(
            sum(len(tensor.shape) >= 2 for tensor in group.tensors) - len(its)
            for group, its in zip(layers, stacks, strict=True)
        ),
        expert_products=tuple(map(len, stacks)),
        num_experts=_first_count(text, _NUM_EXPERTS) or 0 if any(stacks) else 0,
        layer_kv_bytes=tuple(
            (shape if shape.owner is None else every_kv[shape.owner]).token_bytes(dtype)
            for shape in every_kv
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
    rows, columns = max((shape for shape in shapes if len(shape) == 2), key=math.prod)
    return rows, columns


def _met_elements(shape: tuple[int, ...], text: Any) -> int:
    if len(shape) < 2:
        return 0  # norms and biases
    if _is_stack(shape, text):
        return int(_first_count(text, _NUM_CHOSEN) or 1) * math.prod(shape[1:])
    return math.prod(shape)


def _met_values(shape: tuple[int, ...], text: Any) -> int:
    """Inputs and outputs of the products with a tensor that one token meets."""
    if len(shape) < 2:
        return 0
    times = int(_first_count(text, _NUM_CHOSEN) or 1) if _is_stack(shape, text) else 1
    return times * sum(shape[-2:])


def _is_stack(shape: tuple[int, ...], text: Any) -> bool:
    """Whether they are experts' matrices, of which a token meets some."""
    num_chosen = _first_count(text, _NUM_CHOSEN)
    return len(shape) == 3 and shape[0] == _first_count(text, _NUM_EXPERTS) and bool(num_chosen)


def _expert_share(text: Any) -> float:
    """Of a sweep's tokens those that one expert meets, where all are chosen alike."""
    return (_first_count(text, _NUM_CHOSEN) or 1) / (_first_count(text, _NUM_EXPERTS) or 1)


def num_chosen_experts(config: Any) -> int | None:
    """Of a layer's experts, how many one token is sent to; None where the config does not say."""
    return _first_count(config.get_text_config(decoder=True), _NUM_CHOSEN)


def _first_count(text: Any, names: Sequence[str]) -> int | None:
    found = (getattr(text, name, None) for name in names)
    return next((count for count in found if isinstance(count, int)), None)


def _windows(text: Any, num_layers: int) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * num_layers
    if not isinstance(window, int) or window < 1 or len(kinds) != num_layers:
        return (None,) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
