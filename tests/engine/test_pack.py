import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.integrations.gguf.reader import GgufHeader

from engine.compute.skeleton import build_skeleton
from engine.errors import BudgetError, CheckpointError, PackError
from engine.memory.checkpoint import Checkpoint, open_checkpoint
from engine.memory.conversion import Conversion
from engine.memory.manifest import Pack
from engine.memory.pack import ensure_pack, load_buffers, read_group, verify
from engine.memory.pack_plan import PackPlan
from tests.support.gguf_writer import write_gguf
from tests.support.tiny_models import NUM_LAYERS, TINY_MODELS, write_tiny_model

PLENTY_BYTES = 10**9


def pack_of(checkpoint: Checkpoint, spill_dir: Path, attention: str, **options: Any) -> Pack:
    skeleton = build_skeleton(checkpoint.config, attention=attention)
    options = {"disk_bytes": PLENTY_BYTES} | options
    return ensure_pack(checkpoint, skeleton, spill_dir=spill_dir, **options)


def values_of(pack: Pack) -> dict[str, torch.Tensor]:
    return {k: v for group in pack.groups for k, v in read_group(pack, group.name).items()}


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_tiny_model(tmp_path / "source", "llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_a_pack_holds_what_the_library_loads_in_the_stored_dtype(
    tmp_path: Path, name: str, dtype: torch.dtype, attention: str
) -> None:
    folder = write_tiny_model(tmp_path / "source", name, dtype=dtype, max_shard_bytes=200_000)
    values = values_of(pack_of(open_checkpoint(folder), tmp_path, attention))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = dict(oracle.named_parameters())
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        assert values[key].dtype == dtype
        assert torch.equal(values[key], value), key


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_packs_to_the_model_it_was_made_from(
    tmp_path: Path, name: str, attention: str
) -> None:
    config = TINY_MODELS["llama" if name == "llama" else "qwen3"]()
    fields = config.to_dict() | {"model_type": name, "tie_word_embeddings": name == "qwen2"}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**fields)
    )
    for parameter in model.parameters():
        parameter.data.normal_()  # biases are made as zeros
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", model))
    values = values_of(pack_of(checkpoint, tmp_path, attention))
    expected = dict(model.named_parameters())
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(values[key], value), key


def test_the_demo_models_blocks_are_unpacked_and_its_heads_reordered(
    tmp_path: Path, demo_model: Path, attention: str
) -> None:
    checkpoint = open_checkpoint(demo_model)
    pack = pack_of(checkpoint, tmp_path, attention)
    assert len(values_of(pack)) == 272
    layer = read_group(pack, "layers.7")
    for gguf_name, name, num_heads in [
        ("blk.7.attn_q", "self_attn.q_proj", 9),
        ("blk.7.attn_k", "self_attn.k_proj", 3),
        ("blk.7.attn_v", "self_attn.v_proj", 0),
    ]:
        expected = written_out_q4_1(demo_model, f"{gguf_name}.weight", num_heads)
        packed = layer[f"model.layers.7.{name}.weight"].numpy()
        np.testing.assert_array_equal(packed, expected)


def written_out_q4_1(path: Path, name: str, num_heads: int) -> np.ndarray[Any, Any]:
    """Q4_1 from its definition: per 32 values a scale, a minimum and 16 bytes of two nibbles."""
    header = GgufHeader.from_file(str(path))
    info = next(info for info in header.tensors if info.name == name)
    start = header.data_start + info.offset
    blocks = np.fromfile(path, np.uint8, info.nbytes, offset=start).reshape(-1, 20)
    scale = blocks[:, 0:2].copy().view(np.float16).astype(np.float32)
    minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    rows = (nibbles * scale + minimum).astype(np.float32).reshape(info.shape)
    if not num_heads:
        return rows
    head_dim = info.shape[0] // num_heads
    order = [h * head_dim + 2 * p + o for h in range(num_heads) for o in (0, 1) for p in range(32)]
    return rows[order]


def test_groups_stand_in_sweep_order_aligned_and_without_gaps(
    tmp_path: Path, tiny: Checkpoint, attention: str
) -> None:
    pack = pack_of(tiny, tmp_path, attention)
    layers = [f"layers.{layer}" for layer in range(NUM_LAYERS)]
    assert [group.name for group in pack.groups] == ["embed", *layers, "head"]
    end = 0
    for group in pack.groups:
        assert group.offset_bytes == end
        assert group.offset_bytes % 4096 == group.num_bytes % 4096 == 0
        assert all(tensor.offset_bytes % 64 == 0 for tensor in group.tensors)
        end += group.num_bytes
    assert pack.path.stat().st_size == end == pack.num_bytes


@pytest.mark.parametrize("name", ["opt", "gemma2", "gpt2"])
def test_a_tied_head_is_packed_once(tmp_path: Path, name: str, attention: str) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "source", name))
    pack = pack_of(checkpoint, tmp_path, attention)
    names = Counter(tensor.name for group in pack.groups for tensor in group.tensors)
    assert names.most_common(1)[0][1] == 1
    assert "lm_head.weight" not in names


def test_only_the_sources_of_one_part_are_read_for_it_and_none_stay(
    tiny: Checkpoint, attention: str
) -> None:
    read: list[str] = []

    def watched(name: str) -> Any:
        def arrange(values: torch.Tensor) -> torch.Tensor:
            read.append(name)
            return values

        return dataclasses.replace(tiny.tensors[name], arrange=arrange)

    checkpoint = dataclasses.replace(tiny, tensors={name: watched(name) for name in tiny.tensors})
    conversion = Conversion(checkpoint, build_skeleton(tiny.config, attention=attention))
    assert read == []
    parts = conversion.parts_of("layers.2")
    assert sorted(name for part in parts for name in part.sources) == sorted(
        name for name in tiny.tensors if ".layers.2." in name
    )
    for part in parts:
        read.clear()
        assert conversion.read(part).keys() == set(part.names)
        assert read == list(part.sources)
        assert all(parameter.is_meta for parameter in conversion._scratch.parameters())


def test_a_whole_pack_is_reused_and_not_written_again(
    tmp_path: Path, tiny: Checkpoint, attention: str
) -> None:
    first = pack_of(tiny, tmp_path, attention)
    written_at = first.path.stat().st_mtime_ns
    again = pack_of(tiny, tmp_path, attention, disk_bytes=0, verified=True)
    assert again == first
    assert again.path.stat().st_mtime_ns == written_at


def test_a_pack_of_the_wrong_size_is_written_anew(
    tmp_path: Path, tiny: Checkpoint, attention: str
) -> None:
    pack = pack_of(tiny, tmp_path, attention)
    whole = pack.path.read_bytes()
    pack.path.write_bytes(whole[:-1])
    assert pack_of(tiny, tmp_path, attention).path.read_bytes() == whole


@pytest.mark.parametrize("content", ["", "[]", "{}", '[{"name": 1}]', "[3]"])
def test_a_pack_with_a_damaged_manifest_is_written_anew(
    tmp_path: Path, tiny: Checkpoint, attention: str, content: str
) -> None:
    pack = pack_of(tiny, tmp_path, attention)
    pack.path.with_name("manifest.json").write_text(content)
    assert pack_of(tiny, tmp_path, attention) == pack


def test_a_changed_byte_is_found_by_verify_and_mended_when_asked(
    tmp_path: Path, tiny: Checkpoint, attention: str
) -> None:
    pack = pack_of(tiny, tmp_path, attention)
    whole = pack.path.read_bytes()
    damaged = bytearray(whole)
    damaged[pack.group("layers.1").offset_bytes + 100] ^= 1
    pack.path.write_bytes(damaged)
    with pytest.raises(PackError, match=r"layers\.1"):
        verify(pack)
    assert pack_of(tiny, tmp_path, attention, verified=True).path.read_bytes() == whole
    verify(pack)


def test_an_interrupted_write_leaves_nothing_that_passes_for_a_pack_and_is_gone_on_from(
    tmp_path: Path, tiny: Checkpoint, attention: str
) -> None:
    def interrupt(done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_of(tiny, tmp_path, attention, progress=interrupt)
    folders = [path.name for path in (tmp_path / "packs").iterdir() if path.is_dir()]
    assert folders == [f"{tiny.identity}.partial"]
    told: list[PackPlan] = []
    pack = pack_of(tiny, tmp_path, attention, announce=told.append)
    embedding = pack.group("embed").tensors[0]
    assert told[0].resumes_from_bytes == embedding.num_bytes
    assert told[0].to_write_bytes == pack.num_bytes - embedding.num_bytes
    verify(pack)
    assert sorted(path.name for path in pack.path.parent.iterdir()) == [
        "manifest.json",
        "weights.bin",
    ]


def test_progress_ends_at_the_size_of_the_pack(
    tmp_path: Path, tiny: Checkpoint, attention: str
) -> None:
    seen: list[tuple[int, int]] = []
    pack = pack_of(tiny, tmp_path, attention, progress=lambda *step: seen.append(step))
    assert seen[-1] == (pack.num_bytes, pack.num_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_disk_budget_too_small_is_refused_before_a_byte_is_written(
    tmp_path: Path, tiny: Checkpoint, attention: str
) -> None:
    with pytest.raises(BudgetError, match=r"needs \d+ bytes of disk, the disk budget is 1000"):
        pack_of(tiny, tmp_path, attention, disk_bytes=1000)
    assert not list((tmp_path / "packs").glob("*/*"))


def test_missing_parameters_are_named_and_counted(tiny: Checkpoint, attention: str) -> None:
    lost = "model.layers.3.mlp.up_proj.weight"
    rest = {name: tensor for name, tensor in tiny.tensors.items() if name != lost}
    checkpoint = dataclasses.replace(tiny, tensors=rest)
    skeleton = build_skeleton(tiny.config, attention=attention)
    with pytest.raises(CheckpointError, match=rf"lacks 1 of .*: {lost}"):
        Conversion(checkpoint, skeleton)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(
    tmp_path: Path, tiny: Checkpoint, attention: str
) -> None:
    tiny.config.intermediate_size = 96
    with pytest.raises(
        CheckpointError, match=r"gate_proj.* \(128, 64\), the config asks for \(96, 64\)"
    ):
        pack_of(tiny, tmp_path, attention)


def test_a_missing_expert_is_refused(tmp_path: Path, attention: str) -> None:
    whole = open_checkpoint(write_tiny_model(tmp_path / "source", "mixtral"))
    lost = next(name for name in whole.tensors if ".experts.3." in name)
    rest = {name: tensor for name, tensor in whole.tensors.items() if name != lost}
    with pytest.raises(CheckpointError):
        pack_of(dataclasses.replace(whole, tensors=rest), tmp_path, attention)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(
    tmp_path: Path, attention: str
) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "source", "llama"))
    checkpoint.config.tie_word_embeddings = True
    with pytest.raises(CheckpointError, match="tie_word_embeddings should be false"):
        pack_of(checkpoint, tmp_path, attention)


def test_buffers_that_come_with_the_checkpoint_reach_the_model(
    tmp_path: Path, attention: str
) -> None:
    config = transformers.Glm4MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    expected = torch.arange(4.0)
    model.get_buffer(name).copy_(expected)
    model.save_pretrained(tmp_path / "source")
    checkpoint = open_checkpoint(tmp_path / "source")
    skeleton = build_skeleton(checkpoint.config, attention=attention)
    pack = ensure_pack(checkpoint, skeleton, spill_dir=tmp_path, disk_bytes=PLENTY_BYTES)
    load_buffers(pack, skeleton)
    assert torch.equal(skeleton.get_buffer(name), expected)


def test_a_buffer_without_any_value_is_named(
    tmp_path: Path, tiny: Checkpoint, attention: str
) -> None:
    skeleton = build_skeleton(tiny.config, attention=attention)
    pack = ensure_pack(tiny, skeleton, spill_dir=tmp_path, disk_bytes=PLENTY_BYTES)
    load_buffers(pack, skeleton)
    skeleton.model.register_buffer("gate", torch.tensor([torch.nan]))
    with pytest.raises(CheckpointError, match=r"lacks 1 of 1 buffers: model\.gate"):
        load_buffers(pack, skeleton)
