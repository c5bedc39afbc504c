"""Which model types can be honoured: the one place where a refusal is decided. Reads no weights."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from transformers import AutoModelForCausalLM

from engine.errors import UnsupportedModelError

# Attention a row of pages can serve: every position, or a window of the last ones.
_ATTENTION_KINDS: Final = frozenset({"full_attention", "sliding_attention"})

# Decoders whose config carries `is_decoder=False` although they have no other mode.
_ALWAYS_DECODERS: Final = frozenset({"gpt_neox", "gpt_neox_japanese"})

_REFUSED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "blt": "it works on patches of bytes, not on tokens",
        "diffllama": "it calls attention twice in a layer",
        "git": "it attends to image positions in both directions",
        "hrm_text": "its depth is recurrent",
        "minimax_m3_vl_text": "its attention indexes blocks of the mask",
        "mllama": "its cross attention needs an image",
        "moshi": "it decodes two streams",
    }
)


def require_supported(config: Any) -> None:
    """Raise UnsupportedModelError, naming the type and the reason, unless the type is honoured."""
    reason = _reason_to_refuse(config)
    if reason is not None:
        raise UnsupportedModelError(f"model type {config.model_type!r} is not supported: {reason}")


def _reason_to_refuse(config: Any) -> str | None:
    if type(config) not in AutoModelForCausalLM._model_mapping:  # noqa: SLF001 - no public lookup
        return "it has no causal language model in the library"
    text_config = config.get_text_config(decoder=True)
    for model_type in (config.model_type, text_config.model_type):
        if model_type in _REFUSED:
            return _REFUSED[model_type]
    return _reason_in_config(config, text_config) or _reason_in_class(config)


def _reason_in_config(config: Any, text_config: Any) -> str | None:
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised; use the unquantised checkpoint"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if (
        getattr(text_config, "is_decoder", None) is False
        and text_config.model_type not in _ALWAYS_DECODERS
    ):
        return "it is an encoder"
    kinds = set(getattr(text_config, "layer_types", None) or ()) - _ATTENTION_KINDS
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if getattr(text_config, "num_kv_shared_layers", 0):
        return f"{text_config.num_kv_shared_layers} of its layers share keys and values"
    return None


def _reason_in_class(config: Any) -> str | None:
    model_class = AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001 - as above
    if getattr(model_class, "_is_stateful", False):
        return "its layers keep a recurrent state"
    module = inspect.getmodule(model_class)
    # The library's own test of whether a model can be given another attention.
    if module is None or "ALL_ATTENTION_FUNCTIONS.get_interface" not in inspect.getsource(module):
        return "its attention is not asked for through the library's interface"
    return None
