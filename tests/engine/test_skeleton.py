from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from engine.compute.skeleton import build_skeleton, decoder_layers
from engine.memory.checkpoint import open_checkpoint
from engine.memory.pack import ensure_pack, read_group
from tests.support.tiny_models import NUM_LAYERS, TINY_MODELS, write_tiny_model


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_parameters_have_no_bytes_and_buffers_have_the_right_values(
    name: str, attention: str
) -> None:
    skeleton = build_skeleton(TINY_MODELS[name](), attention=attention)
    real = transformers.AutoModelForCausalLM.from_config(TINY_MODELS[name]())
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not skeleton.training
    buffers = dict(skeleton.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys()
    for key, value in real.named_buffers():
        assert torch.equal(buffers[key], value), key


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_the_layers_are_found_in_order(name: str, attention: str) -> None:
    skeleton = build_skeleton(TINY_MODELS[name](), attention=attention)
    layers = decoder_layers(skeleton)
    assert len(layers) == NUM_LAYERS
    names = {id(module): key for key, module in skeleton.named_modules()}
    assert [names[id(layer)].split(".")[-1] for layer in layers] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_a_skeleton_with_packed_weights_gives_the_librarys_logits(
    tmp_path: Path, name: str, attention: str
) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "source", name))
    skeleton = build_skeleton(checkpoint.config, attention=attention)
    pack = ensure_pack(checkpoint, skeleton, spill_dir=tmp_path, disk_bytes=10**9)
    for group in pack.groups:
        for key, value in read_group(pack, group.name).items():
            bind(skeleton, key, value)
    skeleton.tie_weights()
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.source, attn_implementation="eager", dtype=torch.float32
    )
    input_ids = torch.arange(40)[None] * 5 % 256
    position_ids = torch.arange(40)[None]
    with torch.inference_mode():
        found = skeleton(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        expected = oracle(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def bind(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def test_the_given_config_is_left_as_it_was(attention: str) -> None:
    config = TINY_MODELS["llama"]()
    before = config.to_dict()
    build_skeleton(config, attention=attention, dtype=torch.bfloat16)
    assert config.to_dict() == before


def test_a_sixteen_bit_skeleton_has_sixteen_bit_parameters(attention: str) -> None:
    skeleton = build_skeleton(TINY_MODELS["llama"](), attention=attention, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in skeleton.parameters()} == {torch.bfloat16}
    assert skeleton.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32
