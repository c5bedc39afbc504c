"""TABLE of GGUF architectures: how each one's metadata and tensors become a model type's of the
library. Knows names, shapes and orders of values; reads no file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

Arrange = Callable[[Any, torch.Tensor], torch.Tensor]  # the library's config, values as stored


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GgufArchitecture:
    """`layer_names` and `outer_names` give each stem of a GGUF name its stem in the library's
    checkpoints, `{expert}` standing for one of the experts that GGUF stacks in one tensor.

    `library_table` is the name of the library's own table of config fields; `fields` adds what it
    lacks, `fixed` what llama.cpp takes as given, `present` the flags that stand for the presence of
    a tensor. `arrange` undoes, by stem, what its converter does to values.
    """

    model_type: str
    library_table: str
    layer_names: Mapping[str, str]
    outer_names: Mapping[str, str]
    layer_prefix: str = "model.layers"
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    present: Mapping[str, str] = dataclasses.field(default_factory=dict)
    arrange: Mapping[str, Arrange] = dataclasses.field(default_factory=dict)
    has_partial_rotary: bool = False
    max_layers: int | None = None

    def config_fields(self) -> dict[str, str]:
        """The config's fields, and the metadata key (after the architecture's name) of each."""
        library = GGUF_CONFIG_MAPPING[self.library_table]
        return {field: key for key, field in library.items() if field is not None} | dict(
            self.fields
        )

    @property
    def has_experts(self) -> bool:
        return any("{expert}" in name for name in self.layer_names.values())


def uninterleave_queries(config: Any, values: torch.Tensor) -> torch.Tensor:
    return _uninterleave(values, config.num_attention_heads)


def uninterleave_keys(config: Any, values: torch.Tensor) -> torch.Tensor:
    return _uninterleave(values, config.num_key_value_heads)


def _uninterleave(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows (head, pair, 2) become (head, 2, pair): the library rotates halves, not pairs."""
    pairs = values.shape[0] // num_heads // 2
    rows = values.reshape(num_heads, pairs, 2, *values.shape[1:])
    return rows.transpose(1, 2).reshape(values.shape)


def transpose(config: Any, values: torch.Tensor) -> torch.Tensor:
    """Biases of the same stem stay as they are."""
    return values.T.contiguous() if values.ndim > 1 else values


def subtract_one(config: Any, values: torch.Tensor) -> torch.Tensor:
    """Norms whose weight is an offset from one are stored with the one added, in float32."""
    return (values.float() - 1).to(values.dtype)


def as_row(config: Any, values: torch.Tensor) -> torch.Tensor:
    return values.reshape(1, -1)


_OUTER: Final[Mapping[str, str]] = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)
_ATTENTION: Final[Mapping[str, str]] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
    }
)
_HEAD_NORMS: Final[Mapping[str, str]] = MappingProxyType(
    {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
)
_DENSE: Final[Mapping[str, str]] = MappingProxyType(
    {
        **_ATTENTION,
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_EXPERTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **_ATTENTION,
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
        "ffn_up_exps": "mlp.experts.{expert}.up_proj",
        "ffn_down_exps": "mlp.experts.{expert}.down_proj",
    }
)
_SHARED_EXPERT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    }
)
_GEMMA: Final[Mapping[str, str]] = MappingProxyType(
    {
        **_DENSE,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
_GEMMA_NORMS: Final[Mapping[str, Arrange]] = MappingProxyType(
    dict.fromkeys(
        (
            "attn_norm",
            "post_attention_norm",
            "ffn_norm",
            "post_ffw_norm",
            "attn_q_norm",
            "attn_k_norm",
            "output_norm",
        ),
        subtract_one,
    )
)
_HEAD_SIZE: Final[Mapping[str, str]] = MappingProxyType({"head_dim": "attention.key_length"})
_GEMMA_SCALE: Final[Mapping[str, str]] = MappingProxyType(
    {"query_pre_attn_scalar": "attention.key_length"}
)
_EXPERT_SIZE: Final[Mapping[str, str]] = MappingProxyType(
    {"moe_intermediate_size": "expert_feed_forward_length"}
)

ARCHITECTURES: Final[Mapping[str, GgufArchitecture]] = MappingProxyType(
    {
        "llama": GgufArchitecture(
            model_type="llama",
            library_table="llama",
            layer_names=_DENSE,
            outer_names=_OUTER,
            fields=_HEAD_SIZE,
            present={"attention_bias": "blk.0.attn_q.bias"},
            arrange={"attn_q": uninterleave_queries, "attn_k": uninterleave_keys},
        ),
        "qwen2": GgufArchitecture(
            model_type="qwen2",
            library_table="qwen2",
            layer_names=_DENSE,
            outer_names=_OUTER,
            fields=_HEAD_SIZE,
        ),
        "qwen3": GgufArchitecture(
            model_type="qwen3",
            library_table="qwen3",
            layer_names={**_DENSE, **_HEAD_NORMS},
            outer_names=_OUTER,
            fields=_HEAD_SIZE,
        ),
        "qwen2moe": GgufArchitecture(
            model_type="qwen2_moe",
            library_table="qwen2_moe",
            layer_names={**_EXPERTS, **_SHARED_EXPERT},
            outer_names=_OUTER,
            fields={
                **_EXPERT_SIZE,
                "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
            },
            fixed={"norm_topk_prob": False},
            arrange={"ffn_gate_inp_shexp": as_row},
        ),
        "qwen3moe": GgufArchitecture(
            model_type="qwen3_moe",
            library_table="qwen3_moe",
            layer_names={**_EXPERTS, **_HEAD_NORMS},
            outer_names=_OUTER,
            fields=_EXPERT_SIZE,
            fixed={"norm_topk_prob": True},
        ),
        # The largest of these two scale attention by a figure that is in no file.
        "gemma2": GgufArchitecture(
            model_type="gemma2",
            library_table="gemma2",
            layer_names=_GEMMA,
            outer_names=_OUTER,
            fields={
                **_GEMMA_SCALE,
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            arrange=_GEMMA_NORMS,
            max_layers=42,
        ),
        "gemma3": GgufArchitecture(
            model_type="gemma3_text",
            library_table="gemma3",
            layer_names={**_GEMMA, **_HEAD_NORMS},
            outer_names=_OUTER,
            fields=_GEMMA_SCALE,
            arrange=_GEMMA_NORMS,
            max_layers=48,
        ),
        "phi3": GgufArchitecture(
            model_type="phi3",
            library_table="phi3",
            layer_names={
                **_ATTENTION,
                "attn_qkv": "self_attn.qkv_proj",
                "ffn_norm": "post_attention_layernorm",
                "ffn_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
            },
            outer_names=_OUTER,
            fields={"sliding_window": "attention.sliding_window"},
            has_partial_rotary=True,
        ),
        "stablelm": GgufArchitecture(
            model_type="stablelm",
            library_table="stablelm",
            layer_names=_DENSE,
            outer_names=_OUTER,
            fields={
                "rope_theta": "rope.freq_base",
                "use_parallel_residual": "use_parallel_residual",
            },
            present={"use_qkv_bias": "blk.0.attn_q.bias"},
            has_partial_rotary=True,
        ),
        "gpt2": GgufArchitecture(
            model_type="gpt2",
            library_table="gpt2",
            layer_prefix="transformer.h",
            layer_names={
                "attn_norm": "ln_1",
                "attn_qkv": "attn.c_attn",
                "attn_output": "attn.c_proj",
                "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj",
            },
            outer_names={
                "token_embd": "transformer.wte",
                "position_embd": "transformer.wpe",
                "output_norm": "transformer.ln_f",
                "output": "lm_head",
            },
            fields={"n_positions": "context_length", "n_inner": "feed_forward_length"},
            arrange=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), transpose),
        ),
    }
)
