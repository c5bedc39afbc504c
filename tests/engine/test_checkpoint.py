import json
from pathlib import Path

import pytest
import torch
import transformers

from engine.errors import CheckpointError, UnsupportedModelError
from engine.memory.checkpoint import open_checkpoint
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import TINY_MODELS, write_tiny_model


def tiny_gguf(path: Path, name: str = "llama", **extra: float | str) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(TINY_MODELS[name]())
    return write_gguf(path, model, {key.replace("__", "."): v for key, v in extra.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stored_dtype_is_the_one_in_the_files(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, "llama", dtype=dtype))
    assert checkpoint.stored_dtype == dtype
    assert checkpoint.config.model_type == "llama"


def test_a_sharded_checkpoint_gives_every_tensor_of_every_shard(tmp_path: Path) -> None:
    whole = open_checkpoint(write_tiny_model(tmp_path / "whole", "opt"))
    shards = write_tiny_model(tmp_path / "shards", "opt", max_shard_bytes=200_000)
    assert len(list(shards.glob("*.safetensors"))) > 1
    sharded = open_checkpoint(shards)
    assert sharded.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor[...], sharded.tensors[name][...])


def test_a_truncated_shard_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, "llama") / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"names {size} bytes, the file has {size - 100}"):
        open_checkpoint(tmp_path)


def test_a_safetensors_file_cut_inside_its_header_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, "llama") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="file of 100"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "opt", max_shard_bytes=200_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(tmp_path)


def test_a_tensor_that_is_indexed_but_in_no_shard_is_named(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "opt", max_shard_bytes=200_000)
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["lost.weight"] = next(iter(fields["weight_map"].values()))
    index.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"lost\.weight"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")


def test_identity_follows_the_files_and_nothing_else(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    first = open_checkpoint(folder).identity
    assert open_checkpoint(folder).identity == first
    write_tiny_model(tmp_path, "llama", seed=1)
    assert open_checkpoint(folder).identity != first


def test_end_of_sequence_ids_are_those_of_both_configs(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert open_checkpoint(tmp_path).eos_token_ids == (7, 9, 1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "bert"}, "'bert'.*encoder"),
        ({"model_type": "bart"}, "'bart'.*encoder-decoder"),
        ({"model_type": "mamba"}, "'mamba'.*linear_attention"),
        ({"model_type": "bloom"}, "'bloom'.*ALiBi"),
        ({"model_type": "gptj"}, "'gptj'.*library's interface"),
        ({"model_type": "lfm3"}, "'lfm3'.*layers of kind conv"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "both directions"),
        ({"model_type": "diffllama"}, "'diffllama'.*twice"),
        ({"model_type": "vit"}, "'vit'.*no causal language model"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"model_type": "made_up", "architectures": ["MadeUp"]}, "'made_up'.*MadeUp.*unknown"),
    ],
)
def test_a_type_that_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    write_tiny_model(tmp_path, "llama")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModelError, match=reason):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_every_tiny_model_is_supported(tmp_path: Path, name: str) -> None:
    assert open_checkpoint(write_tiny_model(tmp_path, name)).config.model_type == name


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).tensors.keys() == open_checkpoint(path).tensors.keys()
    tiny_gguf(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        open_checkpoint(tmp_path)


def test_a_truncated_gguf_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "a.gguf")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=rf"names \d+ bytes, the file has {size - 5000}"):
        open_checkpoint(path)


@pytest.mark.parametrize("num_bytes", [0, 3, 20, 200])
def test_a_gguf_file_cut_inside_its_header_is_refused(tmp_path: Path, num_bytes: int) -> None:
    path = tiny_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match="truncated or no GGUF"):
        open_checkpoint(path)


def test_a_gguf_file_with_scaled_positions_or_experts_is_refused(tmp_path: Path) -> None:
    scaled = tiny_gguf(tmp_path / "a.gguf", llama__rope__scaling__type="yarn")
    with pytest.raises(UnsupportedModelError, match="yarn"):
        open_checkpoint(scaled)
    experts = tiny_gguf(tmp_path / "b.gguf", llama__expert_count=8)
    with pytest.raises(UnsupportedModelError, match="experts"):
        open_checkpoint(experts)
    other = tiny_gguf(tmp_path / "c.gguf", general__architecture="rwkv7")
    with pytest.raises(UnsupportedModelError, match="rwkv7"):
        open_checkpoint(other)
