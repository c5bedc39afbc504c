"""Writes a float32 GGUF file from a small library model, as llama.cpp's converter lays one out."""

import struct
from pathlib import Path
from typing import Any, Final

import torch

_UINT32, _FLOAT32, _STRING = 4, 6, 8
_LEAVES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER: Final = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def write_gguf(path: Path, model: Any, extra: dict[str, int | float | str] | None = None) -> Path:
    config = model.config
    arch = config.model_type
    metadata: dict[str, int | float | str] = {
        "general.architecture": arch,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.eos_token_id": 1,
    }
    if getattr(config, "head_dim", None):
        metadata[f"{arch}.attention.key_length"] = config.head_dim
    tensors = {
        gguf_name(name): _as_stored(arch, config, name, parameter.detach())
        for name, parameter in model.named_parameters()
    }
    path.write_bytes(_encode(metadata | (extra or {}), tensors))
    return path


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, leaf = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_LEAVES[leaf]}.{kind}"
    return f"{_OUTER.get(stem, 'output')}.{kind}"


def _as_stored(arch: str, config: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    """Query and key rows of llama models: (head, 2, pair) becomes (head, pair, 2)."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    leaf = name.split(".")[-2]
    if arch != "llama" or leaf not in heads:
        return value
    rows = value.reshape(heads[leaf], 2, value.shape[0] // heads[leaf] // 2, *value.shape[1:])
    return rows.swapaxes(1, 2).reshape(value.shape)


def _encode(metadata: dict[str, int | float | str], tensors: dict[str, torch.Tensor]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += _string(key) + _value(value)
    body = b""
    for name, tensor in tensors.items():
        head += _string(name) + struct.pack("<I", tensor.ndim)
        head += struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape))
        head += struct.pack("<IQ", 0, len(body))
        body += _padded(tensor.contiguous().numpy().tobytes())
    return _padded(head) + body


def _value(value: float | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<If", _FLOAT32, value)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)
