"""A GGUF file as a checkpoint: its config and its tensors under the names the library uses.

Block-quantised tensors come out as float32 values. Only architectures whose layout is known here
are read; a file that asks for more than its config can say is refused, not run almost right.
"""

import dataclasses
import functools
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from transformers import AutoConfig
from transformers.integrations.gguf import dequant, reader

from engine.errors import CheckpointError, UnsupportedModelError
from engine.memory.source import Blocks, SourceTensor

# GGUF architectures read here, and the library's model type for each.
_MODEL_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
)
# llama.cpp stores each head's query and key rows in interleaved pairs for these.
_INTERLEAVED_ROPE: Final = frozenset({"llama"})

_CONFIG_KEYS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "context_length": "max_position_embeddings",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "embedding_length": "hidden_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.key_length": "head_dim",
        "rope.freq_base": "rope_theta",
    }
)
_OUTER_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)
_LAYER_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_PLAIN_DTYPES: Final[Mapping[int, torch.dtype]] = MappingProxyType(
    {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A parsed header: nothing of the tensors is read yet."""

    path: Path
    metadata: Mapping[str, Any]
    header: Any  # the library's GgufHeader

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def read_gguf(path: Path) -> GgufFile:
    """Parse the header and check that the file holds every byte the header names."""
    try:
        metadata, _ = reader.read_gguf_metadata(str(path))
        header = reader.GgufHeader.from_file(str(path))
    except (ValueError, struct.error, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path} is truncated or no GGUF file: {error}") from error
    ends = [header.data_start + info.offset + info.nbytes for info in header.tensors]
    file_bytes = path.stat().st_size
    if max(ends, default=0) > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header names {max(ends)} bytes, the file has {file_bytes}"
        )
    return GgufFile(path=path, metadata=metadata, header=header)


def read_config(file: GgufFile) -> Any:
    """The library's config for this file."""
    _refuse_what_the_config_cannot_say(file)
    arch = file.architecture
    fields = {
        field: file.metadata[f"{arch}.{key}"]
        for key, field in _CONFIG_KEYS.items()
        if f"{arch}.{key}" in file.metadata
    }
    fields["vocab_size"] = _vocab_size(file)
    fields["tie_word_embeddings"] = all(
        info.name != "output.weight" for info in file.header.tensors
    )
    for role in ("bos", "eos"):
        fields[f"{role}_token_id"] = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
    if "head_dim" not in fields and f"{arch}.rope.dimension_count" in file.metadata:
        fields["head_dim"] = file.metadata[f"{arch}.rope.dimension_count"]
    return AutoConfig.for_model(_MODEL_TYPES[arch], **fields)


def read_tensors(file: GgufFile) -> dict[str, SourceTensor]:
    """Every tensor the model takes, by its name in the library's own checkpoints."""
    tensors: dict[str, SourceTensor] = {}
    for info in file.header.tensors:
        name = library_name(info.name)
        if name is None:
            raise UnsupportedModelError(
                f"{file.path}: tensor {info.name} has no known place in a {file.architecture} model"
            )
        tensors[name] = _tensor(file, info)
    return tensors


def library_name(gguf_name: str) -> str | None:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`; None if not known."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name):
        layer, leaf, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER_NAMES[leaf]}.{kind}" if leaf in _LAYER_NAMES else None
    stem, _, kind = gguf_name.rpartition(".")
    return f"{_OUTER_NAMES[stem]}.{kind}" if stem in _OUTER_NAMES else None


def _refuse_what_the_config_cannot_say(file: GgufFile) -> None:
    arch = file.architecture
    if arch not in _MODEL_TYPES:
        raise UnsupportedModelError(
            f"{file.path} is of GGUF architecture {arch!r}; read here: {', '.join(_MODEL_TYPES)}"
        )
    if file.metadata.get(f"{arch}.expert_count", 0):
        raise UnsupportedModelError(f"{file.path}: experts in a GGUF {arch} file are not read")
    scaling = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none" or any(info.name.startswith("rope_") for info in file.header.tensors):
        raise UnsupportedModelError(
            f"{file.path} scales its rotary positions ({scaling}, rope_freqs), which its metadata "
            "describes too loosely to rebuild; use the safetensors folder of this model"
        )


def _vocab_size(file: GgufFile) -> int:
    for info in file.header.tensors:
        if info.name == "token_embd.weight":
            return int(info.shape[0])
    raise CheckpointError(f"{file.path} holds no token_embd.weight")


def _tensor(file: GgufFile, info: Any) -> SourceTensor:
    num_heads = _num_rotated_heads(file, info.name)
    return SourceTensor(
        path=file.path,
        offset_bytes=file.header.data_start + info.offset,
        num_bytes=info.nbytes,
        shape=tuple(info.shape),
        dtype=_PLAIN_DTYPES.get(info.ggml_type, torch.float32),
        blocks=None if info.ggml_type in _PLAIN_DTYPES else _blocks(info.ggml_type),
        arrange=functools.partial(_uninterleave, num_heads) if num_heads else None,
    )


def _num_rotated_heads(file: GgufFile, name: str) -> int:
    """How many heads' rows the tensor interleaves; 0 where its rows stand in order."""
    arch = file.architecture
    if arch not in _INTERLEAVED_ROPE or not re.search(r"\.attn_[qk]\.", name):
        return 0
    num_heads = int(file.metadata[f"{arch}.attention.head_count"])
    if ".attn_q." in name:
        return num_heads
    return int(file.metadata.get(f"{arch}.attention.head_count_kv", num_heads))


def _blocks(ggml_type: int) -> Blocks:
    _, block_bytes = dequant.GGML_BLOCK[ggml_type]
    return Blocks(
        block_bytes=block_bytes,
        decode=lambda raw: dequant.dequantize(raw, ggml_type, torch.float32),
    )


def _uninterleave(num_heads: int, values: torch.Tensor) -> torch.Tensor:
    """Rows (head, pair, 2) become (head, 2, pair): the library rotates halves, not pairs."""
    pairs = values.shape[0] // num_heads // 2
    rows = values.reshape(num_heads, pairs, 2, *values.shape[1:])
    return rows.transpose(1, 2).reshape(values.shape)
