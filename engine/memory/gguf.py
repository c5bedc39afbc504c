"""A GGUF file as a checkpoint: its config and its tensors under the names the library uses.

Block-quantised tensors come out as float32 values. Only architectures whose layout is known here
are read; a file that asks for more than its config can say is refused, not run almost right.
"""

import dataclasses
import functools
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from transformers import AutoConfig
from transformers.integrations.gguf import dequant, reader

from engine.errors import CheckpointError, UnsupportedModelError
from engine.memory.gguf_architectures import ARCHITECTURES, GgufArchitecture
from engine.memory.source import Blocks, SourceTensor

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
        raise CheckpointError(
            f"{path} is truncated or no GGUF file that is read here: {error}"
        ) from error
    ends = [header.data_start + info.offset + info.nbytes for info in header.tensors]
    file_bytes = path.stat().st_size
    if max(ends, default=0) > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header names {max(ends)} bytes, the file has {file_bytes}"
        )
    return GgufFile(path=path, metadata=metadata, header=header)


def read_config(file: GgufFile) -> Any:
    """The library's config for this file. Raises UnsupportedModelError."""
    architecture = _architecture(file)
    _refuse_what_the_config_cannot_say(file, architecture)
    fields: dict[str, Any] = {
        field: file.metadata[f"{file.architecture}.{key}"]
        for field, key in architecture.config_fields().items()
        if f"{file.architecture}.{key}" in file.metadata
    }
    fields["vocab_size"] = _vocab_size(file)
    names = {info.name for info in file.header.tensors}
    fields["tie_word_embeddings"] = "output.weight" not in names
    fields |= {field: name in names for field, name in architecture.present.items()}
    for role in ("bos", "eos", "pad"):
        key = {"pad": "padding"}.get(role, role)
        fields[f"{role}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if architecture.has_partial_rotary:
        fields["partial_rotary_factor"] = _rotary_share(file)
    elif _rotary_share(file) != 1:
        raise UnsupportedModelError(f"{file.path} rotates only {_rotary_share(file)} of each head")
    return AutoConfig.for_model(architecture.model_type, **(fields | dict(architecture.fixed)))


def read_tensors(file: GgufFile, config: Any) -> dict[str, SourceTensor]:
    """Every tensor the model takes, by its name in the library's own checkpoints."""
    tensors: dict[str, SourceTensor] = {}
    for info in file.header.tensors:
        name = library_name(file.architecture, info.name)
        if name is None:
            raise UnsupportedModelError(
                f"{file.path}: tensor {info.name} has no known place in a {file.architecture} model"
            )
        tensor = _tensor(file, info, config)
        tensors |= dict(_experts(name, tensor)) if "{expert}" in name else {name: tensor}
    return tensors


def library_name(architecture: str, gguf_name: str) -> str | None:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`; None if not known."""
    known = ARCHITECTURES[architecture]
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name):
        layer, stem, kind = match.groups()
        leaf = known.layer_names.get(stem)
        return f"{known.layer_prefix}.{layer}.{leaf}.{kind}" if leaf else None
    stem, _, kind = gguf_name.rpartition(".")
    return f"{known.outer_names[stem]}.{kind}" if stem in known.outer_names else None


def _architecture(file: GgufFile) -> GgufArchitecture:
    if file.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path} is of GGUF architecture {file.architecture!r}; read here: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[file.architecture]


def _refuse_what_the_config_cannot_say(file: GgufFile, architecture: GgufArchitecture) -> None:
    arch = file.architecture
    if file.metadata.get(f"{arch}.expert_count", 0) and not architecture.has_experts:
        raise UnsupportedModelError(f"{file.path}: experts in a GGUF {arch} file are not read")
    scaling = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none" or any(info.name.startswith("rope_") for info in file.header.tensors):
        raise UnsupportedModelError(
            f"{file.path} scales its rotary positions ({scaling}, rope_freqs), which its metadata "
            "describes too loosely to rebuild; use the safetensors folder of this model"
        )
    num_layers = int(file.metadata.get(f"{arch}.block_count", 0))
    if architecture.max_layers is not None and num_layers > architecture.max_layers:
        raise UnsupportedModelError(
            f"{file.path}: a GGUF {arch} model of {num_layers} layers, more than "
            f"{architecture.max_layers}, scales its attention by a figure that the file does not "
            "hold; use the safetensors folder of this model"
        )
    window = file.metadata.get(f"{arch}.attention.sliding_window", 0)
    if window and "sliding_window" not in architecture.config_fields():
        raise UnsupportedModelError(f"{file.path}: a window of {window} in a GGUF {arch} file")


def _rotary_share(file: GgufFile) -> float:
    """Of a head's elements, how many are rotated; 1 where the file does not say."""
    arch, metadata = file.architecture, file.metadata
    hidden_size = metadata.get(f"{arch}.embedding_length", 0)
    num_heads = metadata.get(f"{arch}.attention.head_count", 1)
    head_size = metadata.get(f"{arch}.attention.key_length", hidden_size // num_heads)
    return float(metadata.get(f"{arch}.rope.dimension_count", head_size) / head_size)


def _vocab_size(file: GgufFile) -> int:
    for info in file.header.tensors:
        if info.name == "token_embd.weight":
            return int(info.shape[0])
    raise CheckpointError(f"{file.path} holds no token_embd.weight")


def _tensor(file: GgufFile, info: Any, config: Any) -> SourceTensor:
    stem = info.name.split(".")[-2]
    arrange = ARCHITECTURES[file.architecture].arrange.get(stem)
    return SourceTensor(
        path=file.path,
        offset_bytes=file.header.data_start + info.offset,
        num_bytes=info.nbytes,
        shape=tuple(info.shape),
        dtype=_PLAIN_DTYPES.get(info.ggml_type, torch.float32),
        blocks=None if info.ggml_type in _PLAIN_DTYPES else blocks_of(info.ggml_type),
        arrange=functools.partial(arrange, config) if arrange else None,
    )


def _experts(name: str, stacked: SourceTensor) -> Iterator[tuple[str, SourceTensor]]:
    """The experts one by one, as the library's converter takes them: blocks never span two."""
    num_experts = stacked.shape[0]
    num_bytes = stacked.num_bytes // num_experts
    for expert in range(num_experts):
        yield (
            name.replace("{expert}", str(expert)),
            dataclasses.replace(
                stacked,
                offset_bytes=stacked.offset_bytes + expert * num_bytes,
                num_bytes=num_bytes,
                shape=stacked.shape[1:],
            ),
        )


def blocks_of(ggml_type: int) -> Blocks:
    _, block_bytes = dequant.GGML_BLOCK[ggml_type]
    return Blocks(
        block_bytes=block_bytes,
        decode=lambda raw: dequant.dequantize(raw, ggml_type, torch.float32),
    )
