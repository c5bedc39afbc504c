"""Writes a checkpoint of seeded random bfloat16 weights, and a Llama-shaped one as a GGUF file too.

    python -m bench.seeded_model [--layers 16 --hidden 2048 ...]

A part of a tensor at a time, so that memory stays far below the file. The values mean nothing: only
shapes, bytes and speed do. The default is the shape of Llama-3.2-1B, 2.47 GB.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Protocol

import gguf
import numpy as np
import safetensors
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from bench.llama_shape import (
    MAX_POSITIONS,
    NORM_EPSILON,
    ROPE_THETA,
    HalfType,
    LlamaShape,
    add_shape_arguments,
)
from bench.peers import DEFAULT_CACHE, absolute

_STD: Final = 0.02
_CHUNK_VALUES: Final = 2**24
"""Drawn at once, in float32."""

_NORMAL_TOKEN: Final = 1
_CONTROL_TOKEN: Final = 3
_LEAVES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Shape(Protocol):
    """Whatever says what a checkpoint's config and tensors are."""

    @property
    def seed(self) -> int: ...
    @property
    def config(self) -> dict[str, Any]: ...
    def tensors(self) -> Iterable[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the file."""
        ...


def write_checkpoint(folder: Path, shape: Shape) -> Path:
    """A Hugging Face folder; nothing is written where one of this shape is already whole."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_safetensors(folder / "model.safetensors", shape)
        _write_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps(shape.config, indent=2))  # last: it is whole
    return folder


def _write_safetensors(path: Path, shape: Shape) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sizes in shape.tensors():
        start, end = end, end + 2 * int(np.prod(sizes))
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # A GPU draws other values, in no time.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(shape.seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, sizes in shape.tensors():
            num_values = int(np.prod(sizes))
            for start in range(0, num_values, _CHUNK_VALUES):
                value = torch.ones(min(_CHUNK_VALUES, num_values - start), device=device)
                if len(sizes) > 1 or name.endswith(".bias"):
                    value.normal_(std=_STD, generator=generator)
                file.write(value.bfloat16().view(torch.int16).cpu().numpy().data)


def _write_tokenizer(folder: Path) -> None:
    """Of the 256 bytes only: prompts are token ids, and what an id spells does not matter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def write_gguf(path: Path, folder: Path, shape: LlamaShape, half: HalfType) -> Path:
    """The folder's weights for llama.cpp, in as many bytes; nothing is written if it is there."""
    if path.exists():
        return path
    partial = path.with_suffix(".part")
    writer = gguf.GGUFWriter(partial, "llama")
    _write_metadata(writer, shape, half)
    kind = gguf.GGMLQuantizationType.F16 if half == "f16" else gguf.GGMLQuantizationType.BF16
    for name, sizes in shape.tensors():
        is_vector = len(sizes) == 1
        writer.add_tensor_info(
            _gguf_name(name),
            sizes,
            np.dtype(np.float32 if is_vector else np.float16),
            int(np.prod(sizes)) * (4 if is_vector else 2),
            raw_dtype=None if is_vector else kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as source:
        for name, _ in shape.tensors():
            writer.write_tensor_data(_stored(name, source.get_tensor(name), shape, half))
    writer.close()
    return partial.rename(path)


def _write_metadata(writer: gguf.GGUFWriter, shape: LlamaShape, half: HalfType) -> None:
    file_type = gguf.LlamaFileType.MOSTLY_F16 if half == "f16" else gguf.LlamaFileType.MOSTLY_BF16
    writer.add_file_type(file_type)
    writer.add_context_length(MAX_POSITIONS)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(shape.vocab)
    # llama.cpp wants a vocabulary as large as the embedding: the bytes, and names for the rest.
    spelled = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    filler = [f"<{index}>" for index in range(len(spelled), shape.vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*spelled, *filler])
    writer.add_token_types([_CONTROL_TOKEN] * 2 + [_NORMAL_TOKEN] * (shape.vocab - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bool("tokenizer.ggml.add_bos_token", val=False)


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        layer, _, leaf = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        return f"blk.{layer}.{_LEAVES[leaf]}.weight"
    return "token_embd.weight" if "embed_tokens" in name else "output_norm.weight"


def _stored(
    name: str, value: torch.Tensor, shape: LlamaShape, half: HalfType
) -> np.ndarray[Any, Any]:
    """As the file holds it. Query and key rows of a head go from halves to pairs."""
    if value.ndim == 1:
        return value.float().numpy()
    num_heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
    if num_heads:
        value = value.view(num_heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    if half == "f16":
        return value.half().numpy()
    return value.contiguous().view(torch.float16).numpy()  # the very bits, whatever they are called


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=absolute, default=DEFAULT_CACHE)
    parser.add_argument("--halves", nargs="*", choices=["f16", "bf16"], default=["bf16"])
    add_shape_arguments(parser)
    arguments = parser.parse_args()
    shape = LlamaShape.from_arguments(arguments)
    folder = write_checkpoint(shape.checkpoint(arguments.cache), shape)
    for half in arguments.halves:
        write_gguf(shape.gguf(arguments.cache, half), folder, shape, half)
    return 0


if __name__ == "__main__":
    sys.exit(main())
