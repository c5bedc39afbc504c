"""Mixture-of-experts layers, registered with transformers: tokens sorted by expert, each expert that
has tokens computed once. Knows no router and not where an expert's weights come from.

A module's stacks are indexed one expert at a time, `stack[expert]`, and never where no token went,
so whatever answers with a matrix and has a `shape` may stand in a parameter's place.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from engine.compute.linear import MULTIPLIER_ATTRIBUTE, Multiplier
from engine.memory.kinds import EXPERTS_NAME

__all__: Final = ["EXPERTS_NAME", "freight_experts"]


def freight_experts(
    module: Any,  # transformers' expert modules are untyped
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """(tokens, size) hidden, (tokens, chosen) experts and their weights; returns (tokens, size)."""
    out = torch.zeros_like(hidden)
    num_chosen = top_k_index.shape[-1]
    weights = top_k_weights.reshape(-1)
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(top_k_index.reshape(-1)).tolist()
    end = 0
    # Ids beyond the stack stand for no expert: a router may mask a choice so.
    for expert, count in enumerate(counts[: module.down_proj.shape[0]]):
        chosen = order[end : end + count]
        end += count
        if count:
            tokens = chosen // num_chosen
            answer = _expert(module, expert, hidden[tokens]) * weights[chosen, None]
            out.index_add_(0, tokens, answer.to(out.dtype))
    return out


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, freight_experts)


def _expert(module: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """One expert over the tokens that chose it, before their weights."""
    up = _project(module, "gate_up_proj" if module.has_gate else "up_proj", expert, hidden)
    inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)  # noqa: SLF001 - the interface
    answer = _project(module, "down_proj", expert, inner)
    if getattr(module, "has_post_expert_norm", False):  # newer than the oldest library we take
        answer = module.post_expert_norm(answer)
    return answer


def _project(module: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    multiplier: Multiplier | None = getattr(module, MULTIPLIER_ATTRIBUTE, None)
    if multiplier is not None:
        return multiplier.product(x, weight, bias, transposed=module.is_transposed)
    return F.linear(x, weight.t() if module.is_transposed else weight, bias)
