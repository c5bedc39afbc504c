"""What the engine's suites share: a registered attention and the tiny models' names."""

from typing import Any

import pytest
import torch
import transformers

torch.set_num_threads(1)  # tiny tensors gain nothing from threads that wait for busy cores


def reference_attention(  # noqa: PLR0917 - the library's signature
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention written out: (batch, heads, context, head_dim) in, heads after context out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    scores = query @ key.transpose(2, 3) * scaling
    if (softcap := options.get("softcap")) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(query.shape[2])
    distance = position[:, None] - position[None, :]
    window = options.get("sliding_window") or query.shape[2]
    hidden = (distance < 0) | (distance >= window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.fixture(scope="session")
def attention() -> str:
    """The name under which `reference_attention` is registered; the library then builds no mask."""
    transformers.AttentionInterface.register("reference", reference_attention)
    return "reference"
