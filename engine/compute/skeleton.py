"""The library's model without its weights: parameters on meta, buffers real, eval mode."""

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from engine.errors import UnsupportedModelError
from engine.memory.layout import decoder_layers

__all__ = ["build_skeleton", "decoder_layers"]


def build_skeleton(
    config: Any,
    *,
    attention: str,
    experts: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A `PreTrainedModel` whose forward asks the attention registered under `attention`.

    The given config is left as it is; the model has its own. With a 16-bit `dtype`, parameters the
    model's type keeps in float32 stay so.
    """
    config = copy.deepcopy(config)
    options = {"attn_implementation": attention, "dtype": dtype}
    if experts is not None:
        options["experts_implementation"] = experts
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options)
    _make_buffers_real(model)
    _keep_in_float32(model, dtype)
    return model.eval()


def _make_buffers_real(model: Any) -> None:
    """Have the library fill the buffers, as it does after loading: meta ones have no values.

    Its initialisation also runs over the parameters, where on meta it computes nothing. Floating
    buffers start as NaN, so that one which nobody fills is noticed here and not in the output.
    """
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            real = torch.zeros_like(buffer, device="cpu")
            if real.is_floating_point():
                real.fill_(torch.nan)
            module._buffers[name] = real  # noqa: SLF001 - keeps persistence as it was
    model.initialize_weights()
    persistent = model.state_dict().keys()  # these come with the weights: see load_buffers
    missing = [
        name
        for name, buffer in model.named_buffers()
        if name not in persistent and buffer.is_floating_point() and buffer.isnan().any()
    ]
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {len(missing)} buffers cannot be rebuilt: {missing[:3]}"
        )


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    patterns = model._get_dtype_plan(dtype)  # noqa: SLF001 - the library's loader asks the same
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if any(re.search(pattern, name) for pattern in patterns):
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
