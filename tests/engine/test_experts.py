"""The experts function beside the library's own loop over experts, on the library's own modules."""

from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from engine.compute.experts import freight_experts
from engine.compute.gemm import Gemm
from engine.compute.linear import MULTIPLIER_ATTRIBUTE, Multiplier
from tests.support.shrunk_models import causal_types, randomise, shrink

NUM_TOKENS: Final = 11
_NAMES: Final = ("gate_up_proj", "up_proj", "down_proj")

# Plain, soft gates, transposed and interleaved with biases, a gate of its own, no gate at all.
TYPES: Final = (
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "olmoe",
    "granitemoe",
    "phimoe",
    "aria_text",
    "beam",
    "nemotron_h",
)


class Stack:
    """Matrices that are handed out one at a time and in the dtype they are stored in."""

    def __init__(self, weights: torch.Tensor) -> None:
        self._weights = weights
        self.shape = weights.shape
        self.asked: list[int] = []

    def __getitem__(self, expert: int) -> torch.Tensor:
        self.asked.append(expert)
        return self._weights[expert]


def experts_of(name: str) -> Any:
    """The last experts module of a shrunk model, set to the library's own loop."""
    config = shrink(causal_types()[name])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    randomise(model)
    return [module for module in model.modules() if hasattr(module, "has_gate")][-1]


def inputs_of(module: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, two experts for each token and their weights; nobody chooses expert 2."""
    generator = torch.Generator().manual_seed(3)
    down = module.down_proj
    size = down.shape[2] if module.is_transposed else down.shape[1]
    hidden = torch.randn(NUM_TOKENS, size, generator=generator)
    offsets = torch.randint(1, 3, (NUM_TOKENS,), generator=generator)
    first = torch.randint(0, 3, (NUM_TOKENS,), generator=generator)
    chosen = torch.tensor([0, 1, 3])[torch.stack([first, (first + offsets) % 3], dim=1)]
    return hidden, chosen, torch.rand(NUM_TOKENS, 2, generator=generator)


def stack_up(module: Any, dtype: torch.dtype = torch.float32) -> list[Stack]:
    """Put a `Stack` in the place of each parameter that is one, as streamed weights do."""
    gemm = Gemm([(1, F.linear)], reason="a test")
    setattr(module, MULTIPLIER_ATTRIBUTE, Multiplier(gemm, torch.device("cpu")))
    stacks = []
    for name in _NAMES:
        weights = getattr(module, name, None)
        if isinstance(weights, nn.Parameter):
            delattr(module, name)
            setattr(module, name, Stack(weights.detach().to(dtype)))
            stacks.append(getattr(module, name))
    return stacks


@pytest.mark.parametrize("name", TYPES)
@torch.inference_mode()
def test_experts_equal_the_librarys_loop(name: str) -> None:
    module = experts_of(name)
    inputs = inputs_of(module)
    expected = module(*inputs)
    assert expected.abs().max() > 0
    torch.testing.assert_close(freight_experts(module, *inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
@torch.inference_mode()
def test_each_expert_with_tokens_is_asked_for_once_and_the_others_never(name: str) -> None:
    module = experts_of(name)
    inputs = inputs_of(module)
    expected = freight_experts(module, *inputs)
    stacks = stack_up(module)
    torch.testing.assert_close(freight_experts(module, *inputs), expected, rtol=1e-5, atol=1e-6)
    assert [stack.asked for stack in stacks] == [[0, 1, 3]] * 2


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.inference_mode()
def test_weights_stored_in_fewer_bits_compute_in_the_dtype_of_the_tokens(name: str) -> None:
    module = experts_of(name)
    for parameter in module.parameters():
        parameter.copy_(parameter.bfloat16())
    inputs = inputs_of(module)
    expected = freight_experts(module, *inputs)
    stack_up(module, torch.bfloat16)
    torch.testing.assert_close(freight_experts(module, *inputs), expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_a_choice_beyond_the_last_expert_counts_for_nothing() -> None:
    module = experts_of("mixtral")
    hidden, chosen, weights = inputs_of(module)
    masked = chosen.clone()
    masked[:, 1] = module.down_proj.shape[0]
    found = freight_experts(module, hidden, masked, weights)
    expected = freight_experts(module, hidden, chosen[:, :1], weights[:, :1])
    torch.testing.assert_close(found, expected)


@torch.inference_mode()
def test_no_tokens_ask_for_no_expert() -> None:
    module = experts_of("mixtral")
    stacks = stack_up(module)
    none = torch.empty(0, 2)
    assert freight_experts(module, torch.empty(0, 64), none.long(), none).shape == (0, 64)
    assert all(stack.asked == [] for stack in stacks)
