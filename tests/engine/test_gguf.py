"""GGUF architectures and block types, against the models they were written from and the library."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.integrations.gguf import dequant

from engine.errors import UnsupportedModelError
from engine.memory.checkpoint import open_checkpoint
from engine.memory.gguf import blocks_of
from engine.memory.gguf_architectures import ARCHITECTURES
from engine.memory.pack import read_group
from tests.support.gguf_writer import encode_gguf, write_gguf
from tests.support.packing import pack_source

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS: Final[dict[str, Any]] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_GEMMA: Final[dict[str, Any]] = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}

CONFIGS: Final[dict[str, Callable[[], Any]]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON, head_dim=32),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON | {"tie_word_embeddings": True}),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=128),
    "qwen2moe": lambda: transformers.Qwen2MoeConfig(
        **_COMMON, **_EXPERTS, shared_expert_intermediate_size=48, norm_topk_prob=False
    ),
    "qwen3moe": lambda: transformers.Qwen3MoeConfig(
        **_COMMON, **_EXPERTS, head_dim=32, norm_topk_prob=True
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **_COMMON | {"tie_word_embeddings": True}, **_GEMMA, final_logit_softcapping=20.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_COMMON | {"tie_word_embeddings": True, "num_hidden_layers": 7}, **_GEMMA
    ),
    "phi3": lambda: transformers.Phi3Config(**_COMMON, sliding_window=8),
    "stablelm": lambda: transformers.StableLmConfig(
        **_COMMON,
        use_qkv_bias=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=256,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        n_inner=96,
        bos_token_id=None,
        eos_token_id=1,
    ),
}
# The library's reader leaves the experts' sizes and gpt2's positions at the config's defaults,
# whatever the file says: there the model that was written is the only oracle.
LIBRARY_READS: Final = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "stablelm")


def seeded_model(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def packed(path: Path, spill_dir: Path) -> dict[str, torch.Tensor]:
    pack = pack_source(path, spill_dir, in_place=True)
    return {k: v for group in pack.groups for k, v in read_group(pack, group.name).items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(2, 42)[None]).logits
    return found


def test_every_architecture_that_is_read_is_tested() -> None:
    assert CONFIGS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_file_gives_the_weights_and_the_config_of_the_model_it_was_written_from(
    tmp_path: Path, name: str
) -> None:
    model = seeded_model(name)
    path = write_gguf(tmp_path / "model.gguf", model)
    values = packed(path, tmp_path)
    expected = dict(model.named_parameters())
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(values[key], value.detach(), rtol=0, atol=2e-7)  # one is added
    rebuilt = transformers.AutoModelForCausalLM.from_config(open_checkpoint(path).config).eval()
    rebuilt.load_state_dict(values, strict=False)
    torch.testing.assert_close(logits(rebuilt), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LIBRARY_READS)
def test_a_file_gives_what_the_librarys_own_reader_makes_of_it(tmp_path: Path, name: str) -> None:
    path = write_gguf(
        tmp_path / "model.gguf",
        seeded_model(name),
        {"tokenizer.ggml.padding_token_id": 0, f"{name}.vocab_size": 256},
    )
    library = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    values = packed(path, tmp_path)
    expected = dict(library.named_parameters())
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(values[key], value), key


@pytest.mark.parametrize(
    "kind", sorted(dequant.GGML_BLOCK), ids=lambda kind: dequant.GGML_NAME[kind]
)
def test_every_block_type_is_unpacked_as_its_reference_does(tmp_path: Path, kind: int) -> None:
    """Random bytes are blocks too, but for scales that are no number."""
    block_values, block_bytes = dequant.GGML_BLOCK[kind]
    rows, columns = 24, 2 * 256
    raw = np.random.default_rng(kind).integers(
        0, 256, (rows, columns // block_values * block_bytes), dtype=np.uint8
    )
    raw[raw & 0x7C == 0x7C] ^= 0x40
    with np.errstate(invalid="ignore"):  # IQ1_M scatters its scale over four bytes
        expected = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType(kind)))
    assert expected.isfinite().float().mean() > 0.9
    tensors = {
        "token_embd.weight": (0, (256, 64), bytes(256 * 64 * 4)),
        "output_norm.weight": (kind, (rows, columns), raw.tobytes()),
    }
    metadata: dict[str, int | float | str] = {
        "general.architecture": "qwen2",
        "qwen2.embedding_length": 64,
        "qwen2.attention.head_count": 4,
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(encode_gguf(metadata, tensors))
    found = open_checkpoint(path).tensors["model.norm.weight"]
    torch.testing.assert_close(found[...], expected, rtol=1e-6, atol=0, equal_nan=True)


def test_a_tensor_of_many_pieces_is_unpacked_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded_model("llama")
    rng = np.random.default_rng(0)
    table = rng.standard_normal((256, 64)).astype(np.float32)
    raw = gguf.quantize(table, gguf.GGMLQuantizationType.Q8_0)
    path = write_gguf(tmp_path / "model.gguf", model)
    tensor = open_checkpoint(path).tensors["model.embed_tokens.weight"]
    file = tmp_path / "blocks"
    file.write_bytes(raw.tobytes())
    blocky = dataclasses.replace(
        tensor, path=file, offset_bytes=0, num_bytes=raw.nbytes, blocks=blocks_of(8)
    )
    whole = blocky[...]
    monkeypatch.setattr("engine.memory.source._PIECE_BYTES", 1000)
    assert torch.equal(blocky[...], whole)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(whole, torch.from_numpy(expected))


def test_what_the_config_cannot_say_is_refused(tmp_path: Path) -> None:
    for name, extra, reason in (
        ("llama", {"llama.attention.sliding_window": 8}, "window of 8"),
        ("llama", {"llama.rope.dimension_count": 16}, "rotates only 0.5"),
        ("gemma2", {"gemma2.block_count": 46}, "46 layers"),
        ("qwen3", {"general.architecture": "falcon"}, "'falcon'; read here: llama, "),
    ):
        path = write_gguf(tmp_path / "model.gguf", seeded_model(name), extra)
        with pytest.raises(UnsupportedModelError, match=reason):
            open_checkpoint(path)
