"""Writes a float32 GGUF file from a small library model, as llama.cpp's converter lays one out.

Names are those of the `gguf` package, so that the reader's are tested against another's.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import torch

_UINT32, _FLOAT32, _BOOL, _STRING = 4, 6, 7, 8
_ARCHITECTURES: Final = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
_OFFSET_NORMS: Final = frozenset({"gemma2", "gemma3"})

Value = int | float | str


def write_gguf(path: Path, model: Any, extra: Mapping[str, Value] | None = None) -> Path:
    arch = _ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch),
        model.config.num_hidden_layers,
    )
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for part, value in _split_experts(name, parameter.detach()):
            stem, dot, kind = part.rpartition(".")
            stored = names.get_name(stem) if dot and kind in {"weight", "bias"} else None
            full = f"{stored}.{kind}" if stored else f"{names.get_name(part)}.weight"
            tensors[full] = _as_stored(arch, model.config, full, value)
    metadata = _metadata(arch, model.config) | dict(extra or {})
    path.write_bytes(_encode(metadata, tensors))
    return path


def _metadata(arch: str, config: Any) -> dict[str, Value]:
    found: dict[str, Value] = {"general.architecture": arch, "tokenizer.ggml.eos_token_id": 1}
    keys = {
        "context_length": "max_position_embeddings",
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon"),
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "use_parallel_residual": "use_parallel_residual",
    }
    for key, fields in keys.items():
        for field in (fields,) if isinstance(fields, str) else fields:
            value = getattr(config, field, None)
            if value is not None:
                found[f"{arch}.{key}"] = value
    if arch == "gpt2":
        found["gpt2.feed_forward_length"] = config.n_inner or 4 * config.n_embd
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope:
        head_size = config.hidden_size // config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or head_size
        rotated = int(head_size * rope.get("partial_rotary_factor", 1))
        found[f"{arch}.rope.freq_base"] = rope["rope_theta"]
        found[f"{arch}.rope.dimension_count"] = rotated
    return found


def _split_experts(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The library joins the experts' gate and up projections, GGUF keeps them apart."""
    if not name.endswith(".experts.gate_up_proj"):
        yield name, value
        return
    for leaf, half in zip(("gate_proj", "up_proj"), value.chunk(2, dim=1), strict=True):
        yield name.replace("gate_up_proj", leaf), half


def _as_stored(arch: str, config: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    if arch == "llama" and ".attn_q." in name:
        return _interleave(value, config.num_attention_heads)
    if arch == "llama" and ".attn_k." in name:
        return _interleave(value, config.num_key_value_heads)
    if arch in _OFFSET_NORMS and "norm" in name:
        return value + 1
    if arch == "gpt2" and name.startswith("blk.") and value.ndim > 1:
        return value.T
    if "ffn_gate_inp_shexp" in name:
        return value.reshape(-1)
    return value


def _interleave(value: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Query and key rows of llama models: (head, 2, pair) becomes (head, pair, 2)."""
    rows = value.reshape(num_heads, 2, value.shape[0] // num_heads // 2, *value.shape[1:])
    return rows.swapaxes(1, 2).reshape(value.shape)


def _encode(metadata: dict[str, Value], tensors: dict[str, torch.Tensor]) -> bytes:
    stored = {
        name: (0, value.shape, value.contiguous().numpy().tobytes())
        for name, value in tensors.items()
    }
    return encode_gguf(metadata, stored)


def encode_gguf(
    metadata: Mapping[str, Value], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]]
) -> bytes:
    """Each tensor as its type, its shape in elements and its bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += _string(key) + _value(value)
    body = b""
    for name, (kind, shape, data) in tensors.items():
        head += _string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += _padded(data)
    return _padded(head) + body


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<If", _FLOAT32, value)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)
