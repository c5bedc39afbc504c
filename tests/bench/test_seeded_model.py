"""The seeded model is one that the library and the engine's own GGUF reader load, with equal values."""

from pathlib import Path

import pytest
import torch
import transformers

from bench.llama_shape import HalfType, LlamaShape
from bench.seeded_model import write_checkpoint, write_gguf
from tests.support.tiny_models import VOCAB_SIZE

_SHAPE = LlamaShape(layers=2, hidden=64, mlp=128, heads=4, kv_heads=2, vocab=2 * VOCAB_SIZE, seed=3)


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_both_files_hold_the_same_model(tmp_path: Path, half: HalfType) -> None:
    folder = write_checkpoint(_SHAPE.checkpoint(tmp_path), _SHAPE)
    file = write_gguf(_SHAPE.gguf(tmp_path, half), folder, _SHAPE, half)
    load = transformers.AutoModelForCausalLM.from_pretrained
    from_folder = load(folder, dtype=torch.float32)
    from_file = load(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        expected, found = from_folder(ids).logits, from_file(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_that_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(_SHAPE.checkpoint(tmp_path), _SHAPE)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    write_checkpoint(folder, _SHAPE)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
