"""Any causal language model type of the library, shrunk to a tiny config that still is of its kind."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

NUM_LAYERS: Final = 4
VOCAB_SIZE: Final = 256
WINDOW_TOKENS: Final = 8

# What a field of this name becomes, in every config that has it and does not leave it None.
_SIZES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "vocab_size": VOCAB_SIZE,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 8,
        "word_embed_proj_dim": 64,
        "intermediate_size": 96,
        "intermediate_size_mlp": 96,
        "ffn_dim": 96,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "shared_intermediate_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_head_dim": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "sliding_window": WINDOW_TOKENS,
        "attention_chunk_size": WINDOW_TOKENS,
        "max_position_embeddings": 512,
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "moe_num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_k": 2,
        "moe_topk": 2,
        "top_k_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_num_shared_experts": 1,
        "n_shared_experts": 1,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_dense_layers": 1,
        "laurel_rank": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)

# These are set even where the default is None: checkpoints of the type have them.
_ALWAYS: Final = frozenset(
    {
        "head_dim",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "num_key_value_heads",
    }
)

# What a type needs beside that to be consistent, or to be of its kind at so few layers.
_ALTERNATING: Final = ["sliding_attention", "full_attention"] * 2
_ROTARY: Final = {"rope_type": "default", "rope_theta": 10_000.0}
_SCALED: Final = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_EXCEPTIONS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "cohere_compass_text": {
            "rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}
        },
        "dbrx": {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
        "emu3": {"vocabulary_map": {"<image>": 5}},
        "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
        "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "emu3_vqgan": {"base_channels": 32, "codebook_size": 16},
        "gemma3n_text": {
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.5] * NUM_LAYERS,
        },
        "gemma4_text": {
            "layer_types": _ALTERNATING,
            "num_kv_shared_layers": 2,
            "global_head_dim": 32,
        },
        "gemma4_unified_text": {
            "layer_types": _ALTERNATING,
            "attention_k_eq_v": True,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
        },
        "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]]},
        "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
        "longcat_flash": {"num_layers": NUM_LAYERS // 2, "zero_expert_num": 2},
        "mamba2": {"num_heads": 8},
        "zaya": {"num_experts_per_tok": 1},
    }
)


# What configs of a type may ask for beside what the shrunk one does: (type, changed fields).
VARIANTS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = MappingProxyType(
    {
        "deepseek_v3 with yarn, queries not compressed": (
            "deepseek_v3",
            {"q_lora_rank": None, "rope_parameters": {**_ROTARY, **_SCALED, "mscale": 0.7}},
        ),
        "gemma3_text with soft caps": (
            "gemma3_text",
            {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        ),
        "gemma4_text with experts": (
            "gemma4_text",
            {
                "num_kv_shared_layers": 0,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 32,
            },
        ),
        "gemma4_text with keys as values": (
            "gemma4_text",
            {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        ),
        "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        "gpt_bigcode with all key heads": ("gpt_bigcode", {"multi_query": False}),
        "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
        "granite with its multipliers": (
            "granite",
            {
                "attention_multiplier": 0.01,
                "embedding_multiplier": 12.0,
                "logits_scaling": 8.0,
                "residual_multiplier": 0.22,
            },
        ),
        "granitemoehybrid without mamba layers": (
            "granitemoehybrid",
            {"layer_types": ["full_attention"] * NUM_LAYERS},
        ),
        "llama with dynamic frequencies": (
            "llama",
            {"rope_parameters": {**_ROTARY, "rope_type": "dynamic", "factor": 2.0}},
        ),
        "llama with llama3 frequencies": (
            "llama",
            {
                "rope_parameters": {
                    **_ROTARY,
                    **_SCALED,
                    "rope_type": "llama3",
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                }
            },
        ),
        "llama tied, with biases": (
            "llama",
            {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        ),
        "llama4_text with tempered queries": (
            "llama4_text",
            {"no_rope_layers": [1, 0] * 2, "floor_scale": 4, "moe_layers": [1, 3]},
        ),
        "ministral3 with scaled queries": (
            "ministral3",
            {
                "rope_parameters": {
                    **_ROTARY,
                    **_SCALED,
                    "original_max_position_embeddings": 8,
                    "llama_4_scaling_beta": 0.5,
                }
            },
        ),
        "olmoe with clipped projections": ("olmoe", {"clip_qkv": 1.0}),
        "opt with its norms behind and a narrow embedding": (
            "opt",
            {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
        ),
        "phi3 with longrope, below the original length": (
            "phi3",
            {
                "rope_parameters": {
                    **_ROTARY,
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        "phimoe with longrope and its factors": (
            "phimoe",
            {
                "rope_parameters": {
                    **_ROTARY,
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "short_mscale": 1.2,
                    "long_mscale": 1.4,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        "stablelm in parallel, with norms of queries": (
            "stablelm",
            {"use_parallel_residual": True, "qk_layernorm": True},
        ),
    }
)


def shrink(config_class: type[PreTrainedConfig], **changes: Any) -> Any:
    """A config of `NUM_LAYERS` layers, each kind of layer among them if there are not too many."""
    return config_class(**{**_shrunk_fields(config_class()), **changes})


def _shrunk_fields(config: Any) -> dict[str, Any]:
    given = vars(config)
    names = {field.name for field in dataclasses.fields(config)}
    generic = {own: name for name, own in type(config).attribute_map.items()}
    fields: dict[str, Any] = {}
    for name in names:
        value = given.get(name)
        known = name if name in _SIZES else generic.get(name, name)
        if isinstance(value, PreTrainedConfig):
            fields[name] = {**_shrunk_fields(value), "model_type": value.model_type}
        elif known in _SIZES and (value is not None or known in _ALWAYS):
            fields[name] = _SIZES[known]
        elif name == "pad_token_id" and value is not None:
            fields[name] = 0
        elif isinstance(value, list) and len(value) == given.get("num_hidden_layers"):
            fields[name] = _cut(value)
    if "qk_rope_head_dim" in names:  # latent attention: every head has its own key and value
        latent = {"num_key_value_heads": 4, "head_dim": 8}
        fields |= {name: value for name, value in latent.items() if name in names}
    if set(fields.get("layer_types", ())) == {"full_attention"} and "sliding_window" in names:
        fields |= {"layer_types": _ALTERNATING, "sliding_window": WINDOW_TOKENS}
        fields |= {"use_sliding_window": True} if "use_sliding_window" in names else {}
    return fields | dict(_EXCEPTIONS.get(config.model_type, {}))


def _cut(values: Sequence[Any]) -> list[Any]:
    """`NUM_LAYERS` of a value for each layer: the first of every kind, in turn."""
    kinds = list(dict.fromkeys(map(str, values)))
    first = {str(value): value for value in reversed(values)}
    return [first[kinds[index % len(kinds)]] for index in range(NUM_LAYERS)]


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Seeded weights wide enough apart that greedy tokens do not hang on rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)


def causal_types() -> dict[str, type[PreTrainedConfig]]:
    """Config classes by type name, for every type the library has a causal language model of."""
    mapping = AutoModelForCausalLM._model_mapping
    return {config.model_type: config for config in mapping}
