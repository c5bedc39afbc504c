"""How fast a layer is beside its products and its attention: one of the library's, without either.
Knows no weights.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from engine.compute.rates import rate_of_more
from engine.memory.stopwatch import Rate

_HIDDEN_SIZE: Final = 1024
_HEAD_SIZE: Final = 64
_NUM_TOKENS: Final = {"cpu": 256, "cuda": 32768}
"""On a GPU so many that computing takes longer than asking."""

_NO_ATTENTION: Final = "freight_no_attention"


class _Given(nn.Module):
    """In a product's place: what it would have come to is there already."""

    def __init__(self, product: torch.Tensor) -> None:
        super().__init__()
        self._product = product

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._product[:, : inputs.shape[1]]


def elementwise_rate(*, dtype: torch.dtype, device: torch.device, seconds: float) -> Rate:
    """Bytes a second that go into and come out of products, by a layer of the Llama kind.

    Of many tokens less what a single one takes: what any visit costs is counted elsewhere.
    """
    most = _NUM_TOKENS[device.type]
    run, num_values = _layer(most, dtype=dtype, device=device)
    amount = (most - 1) * num_values * dtype.itemsize
    return rate_of_more(
        lambda: run(most), lambda: run(1), amount=amount, device=device, seconds=seconds
    )


def _layer(
    num_tokens: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[int], object], int]:
    """What runs it over so many tokens at most, and how many values its products see of each."""
    config = LlamaConfig(
        hidden_size=_HIDDEN_SIZE,
        intermediate_size=3 * _HIDDEN_SIZE,
        num_attention_heads=_HIDDEN_SIZE // _HEAD_SIZE,
        num_key_value_heads=_HIDDEN_SIZE // _HEAD_SIZE // 4,
        num_hidden_layers=1,
        vocab_size=8,
    )
    config._attn_implementation = _NO_ATTENTION  # noqa: SLF001  # the library's own way to set it
    layer = LlamaDecoderLayer(config, 0).to(device=device, dtype=dtype)
    num_values = 0
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                num_values += child.in_features + child.out_features
                product = torch.randn(1, num_tokens, child.out_features, dtype=dtype, device=device)
                setattr(module, name, _Given(product))
    hidden = torch.randn(1, num_tokens, _HIDDEN_SIZE, dtype=dtype, device=device)
    positions = torch.arange(num_tokens, device=device)[None]
    rotations = LlamaRotaryEmbedding(config).to(device)(hidden, positions)

    def run(count: int) -> object:
        some = tuple(each[:, :count] for each in rotations)
        with torch.inference_mode():
            return layer(hidden[:, :count], position_embeddings=some, attention_mask=None)

    return run, num_values


def _no_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return query.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(_NO_ATTENTION, _no_attention)
