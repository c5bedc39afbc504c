"""Which model types can be honoured: the one place where a refusal is decided. Reads no weights."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from transformers import AutoModelForCausalLM

from engine.errors import UnsupportedModelError

# Attention a row of pages can serve: every position, a window of the last ones, or its own chunk.
_ATTENTION_KINDS: Final = frozenset({"chunked_attention", "full_attention", "sliding_attention"})

# Decoders whose config carries `is_decoder=False` although they have no other mode.
_ALWAYS_DECODERS: Final = frozenset({"gpt_neox", "gpt_neox_japanese"})

_ALIBI: Final = "its attention adds a bias that grows with distance (ALiBi)"
_ASSISTANT: Final = "it drafts for another model, whose keys and values it attends to"

# Types refused whatever else their config says.
REFUSED_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "bloom": _ALIBI,
        "blt": "it works on patches of bytes, not on tokens",
        "cpmant": "its attention adds a learned bias that depends on the positions",
        "diffllama": "it calls attention twice in a layer",
        "doge": "its attention hides keys by a mask of its own that it computes from the values",
        "emu3": "the library's language model of it does not find its weights in its checkpoints",
        "gemma3n": "its vision tower is built by packages that Freight does not bring (timm)",
        "gemma4_assistant": _ASSISTANT,
        "gemma4_unified_assistant": _ASSISTANT,
        "git": "it attends to image positions in both directions",
        "hrm_text": "its depth is recurrent",
        "minimax_m3_vl_text": "its attention picks blocks of keys by an index of its own",
        "mllama": "its cross attention needs an image",
        "moshi": "it decodes two streams",
        "mpt": _ALIBI,
        "reformer": "its attention sorts positions into buckets by a hash",
        "trocr": "it is the decoder of an encoder-decoder",
        "xlnet": "its attention runs over a permutation of the positions",
    }
)


def require_supported(config: Any) -> None:
    """Raise UnsupportedModelError, naming the type and the reason, unless the type is honoured."""
    reason = reason_to_refuse(config)
    if reason is not None:
        raise UnsupportedModelError(f"model type {config.model_type!r} is not supported: {reason}")


def reason_to_refuse(config: Any) -> str | None:
    """What `require_supported` would say of the config, None if it is honoured."""
    if type(config) not in AutoModelForCausalLM._model_mapping:  # noqa: SLF001 - no public lookup
        return "it has no causal language model in the library"
    text_config = config.get_text_config(decoder=True)
    for model_type in (config.model_type, text_config.model_type):
        if model_type in REFUSED_TYPES:
            return REFUSED_TYPES[model_type]
    return _reason_in_config(config, text_config) or _reason_in_class(config, text_config)


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
    if getattr(text_config, "use_bidirectional_attention", None) in {True, "all"}:
        return "its config asks for attention in both directions"
    return None


def _reason_in_class(config: Any, text_config: Any) -> str | None:
    """A model around a language model of another type has its layers from that type's code."""
    mapping = AutoModelForCausalLM._model_mapping  # noqa: SLF001 - as above
    classes = [mapping[type(each)] for each in (config, text_config) if type(each) in mapping]
    # Mixed types say so of themselves whatever their layers are; those in use are checked already.
    is_mixed = bool(getattr(text_config, "layer_types", None))
    if not is_mixed and any(getattr(each, "_is_stateful", False) for each in classes):
        return "its layers keep a recurrent state"
    if not any(map(_asks_for_attention, classes)):
        return "its attention is not asked for through the library's interface"
    return None


def _asks_for_attention(model_class: type) -> bool:
    """The library's own test of whether a model can be given another attention."""
    module = inspect.getmodule(model_class)
    return module is not None and "ALL_ATTENTION_FUNCTIONS.get_interface" in inspect.getsource(
        module
    )
