"""Groups that are read where they lie in the source's files."""

import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from engine.config import Budgets
from engine.engine import Engine
from engine.errors import CheckpointError, PackError
from engine.memory.checkpoint import open_checkpoint
from engine.memory.manifest import Pack, PackGroup, open_pack
from engine.memory.pack import check_range, check_tensors, read_group, verify
from engine.memory.pack_plan import PackPlan
from engine.memory.placement import split_groups
from tests.support.oracle import oracle_answer, ragged_prompts
from tests.support.packing import pack_source
from tests.support.policies import streaming
from tests.support.tiny_models import NUM_LAYERS, TINY_MODELS, write_tiny_model

LAYERS = [f"layers.{layer}" for layer in range(NUM_LAYERS)]


def in_place(pack: Pack) -> set[str]:
    return {group.name for group in pack.groups if group.path != pack.path}


def rewrite(folder: Path, order: list[str], *, pad_bytes: int = 0) -> None:
    """The single shard again with its tensors in this order; the library sorts them itself."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    place = pad_bytes
    header = {}
    for name in order:
        num_bytes = tensors[name].nbytes
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensors[name].dtype]
        shape = str(list(tensors[name].shape))
        header[name] = (
            f'{{"dtype":"{kind}","shape":{shape},"data_offsets":[{place},{place + num_bytes}]}}'
        )
        place += num_bytes
    text = "{" + ",".join(f'"{name}":{entry}' for name, entry in header.items()) + "}"
    raw = b"".join(
        tensors[n].contiguous().view(-1).view(torch.uint8).numpy().tobytes() for n in order
    )
    text += " " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text.encode()
    path.write_bytes(prefix + bytes(pad_bytes) + raw)


def tensor_names(folder: Path) -> list[str]:
    return list(safetensors.torch.load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("shard_bytes", [None, 200_000])
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_a_group_has_the_same_values_read_in_place_as_packed(
    tmp_path: Path, name: str, shard_bytes: int | None
) -> None:
    source = write_tiny_model(
        tmp_path / "source", name, dtype=torch.bfloat16, max_shard_bytes=shard_bytes
    )
    packed = pack_source(source, tmp_path / "packed")
    placed = pack_source(source, tmp_path / "placed", in_place=True)
    assert in_place(packed) == set()
    assert [group.name for group in placed.groups] == [group.name for group in packed.groups]
    for group in packed.groups:
        expected, found = read_group(packed, group.name), read_group(placed, group.name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value), key
    if name == "mixtral":  # the library joins its experts
        assert in_place(placed) == {"embed"}
    elif shard_bytes is None:
        assert in_place(placed) >= {"embed", *LAYERS}
        assert placed.num_bytes < packed.num_bytes / 5
    else:  # a layer that lies in two shards is packed
        assert 0 < len(in_place(placed) & set(LAYERS)) < NUM_LAYERS


def test_a_pack_of_nothing_but_places_takes_no_room_and_is_found_again(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", "gpt2")
    told: list[PackPlan] = []
    pack = pack_source(source, tmp_path, in_place=True, disk_bytes=0, announce=told.append)
    assert not pack.path.exists()
    assert told[0].to_write_bytes == told[0].num_bytes == pack.num_bytes == 0
    assert told[0].in_place_bytes == sum(group.num_bytes for group in pack.groups)
    assert pack_source(source, tmp_path, in_place=True, disk_bytes=0, verified=True) == pack


def test_layers_whose_tensors_are_spread_over_the_file_are_packed(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", "llama")
    by_leaf = sorted(tensor_names(source), key=lambda name: name.split(".")[::-1])
    rewrite(source, by_leaf)
    pack = pack_source(source, tmp_path, in_place=True)
    assert not in_place(pack) & set(LAYERS)


def test_little_that_lies_between_is_read_along_and_much_is_not(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", "llama")
    names = tensor_names(source)
    layers = [[name for name in names if f".{layer}." in name] for layer in (0, 1)]
    rest = [name for name in names if name not in layers[0] + layers[1]]
    norm, table = "model.norm.weight", "model.embed_tokens.weight"
    mixed = [layers[0][0], norm, *layers[0][1:], layers[1][0], table, *layers[1][1:]]
    rewrite(source, [*mixed, *(name for name in rest if name not in {norm, table})])
    pack = pack_source(source, tmp_path, in_place=True)
    assert "layers.0" in in_place(pack)
    assert "layers.1" not in in_place(pack)


@pytest.mark.parametrize("pad_bytes", range(4))
def test_tensors_that_start_between_two_items_are_packed(tmp_path: Path, pad_bytes: int) -> None:
    source = write_tiny_model(tmp_path / "source", "llama")
    rewrite(source, tensor_names(source), pad_bytes=pad_bytes)
    checkpoint = open_checkpoint(source)
    is_aligned = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].offset_bytes % 4 == 0
    pack = pack_source(source, tmp_path, in_place=True)
    assert ("layers.0" in in_place(pack)) == is_aligned
    verify(pack)


def test_weights_stream_from_the_source_and_the_pack_in_one_sweep(tmp_path: Path) -> None:
    source = write_tiny_model(
        tmp_path / "source", "llama", dtype=torch.bfloat16, max_shard_bytes=200_000
    )
    pack = pack_source(source, tmp_path, in_place=True)
    assert len({group.path for group in split_groups(pack.groups)[0]}) == 3
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = {prompt.key: oracle_answer(model, prompt)[0] for prompt in ragged_prompts()}
    budgets = Budgets(gpu_bytes=0, host_bytes=2**30, disk_bytes=2**30, spill_dir=tmp_path)
    with Engine.load(source, budgets=budgets, policy=streaming(0.3)) as engine:
        found = {done.key: done.token_ids for done in engine.generate(ragged_prompts())}
        report = engine.report()
        streamed_bytes = engine.policy.streamed_bytes
    assert found == expected
    assert report.weights_streamed_bytes == report.num_sweeps * streamed_bytes


# -- damage ------------------------------------------------------------------------------------


def damage(group: PackGroup) -> None:
    """A bit flips in the middle of the group's last tensor; the file's dates do not tell."""
    tensor = group.tensors[-1]
    dates = group.path.stat()
    with group.path.open("r+b") as file:
        file.seek(group.offset_bytes + tensor.offset_bytes + tensor.num_bytes // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(group.path, ns=(dates.st_atime_ns, dates.st_mtime_ns))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "source", "llama")


def test_damage_after_the_first_read_is_found_in_this_run_and_the_next(
    tmp_path: Path, source: Path
) -> None:
    pack = pack_source(source, tmp_path, in_place=True)
    group = pack.group("layers.1")
    check_tensors(pack, group, read_group(pack, "layers.1"))
    damage(group)
    found = read_group(pack, "layers.1")
    with pytest.raises(CheckpointError, match=r"layers\.1 has checksum .* first read"):
        check_tensors(pack, group, found)
    again = pack_source(source, tmp_path, in_place=True)
    with pytest.raises(CheckpointError, match=group.tensors[-1].name):
        check_tensors(again, again.group("layers.1"), found)
    with pytest.raises(CheckpointError, match=group.tensors[-1].name):
        pack_source(source, tmp_path, in_place=True, verified=True)


def test_what_was_never_read_is_trusted_at_first(tmp_path: Path, source: Path) -> None:
    pack = pack_source(source, tmp_path, in_place=True)
    damage(pack.group("layers.1"))
    verify(pack)
    damage(pack.group("layers.1"))
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        verify(pack)


def test_a_slice_is_learned_and_checked_like_a_whole(tmp_path: Path, source: Path) -> None:
    pack = pack_source(source, tmp_path, in_place=True)
    group = pack.group("layers.2")
    raw = torch.frombuffer(bytearray(group.path.read_bytes()), dtype=torch.uint8)
    data = raw[group.offset_bytes : group.offset_bytes + group.num_bytes]
    half = group.tensors[4].offset_bytes
    check_range(pack, group, half, data[half:])
    data[half] ^= 1
    with pytest.raises(CheckpointError, match=group.tensors[4].name):
        check_range(pack, group, half, data[half:])
    check_range(pack, group, half, data[half:-1][:10])  # no whole chunk in it


def test_a_line_of_learned_checksums_that_was_cut_off_is_no_loss(
    tmp_path: Path, source: Path
) -> None:
    pack = pack_source(source, tmp_path, in_place=True)
    verify(pack)
    learned = pack.path.with_name("learned_checksums.txt")
    text = learned.read_text()
    learned.write_text(text[:-7])
    verify(open_pack(pack.path.parent))
    assert set(text.split("\n")) <= set(learned.read_text().split("\n"))


def test_a_source_that_moved_is_placed_anew(tmp_path: Path, source: Path) -> None:
    pack = pack_source(source, tmp_path, in_place=True)
    moved = tmp_path / "elsewhere" / "source"
    shutil.copytree(source, moved, copy_function=shutil.copy2)
    placed = pack_source(moved, tmp_path, in_place=True)
    assert placed.path == pack.path
    assert {group.path.parent for group in placed.groups} <= {moved, pack.path.parent}
    shutil.rmtree(source)
    verify(placed)


def test_a_source_file_that_is_gone_or_short_is_a_pack_error(tmp_path: Path, source: Path) -> None:
    pack = pack_source(source, tmp_path, in_place=True)
    os.truncate(source / "model.safetensors", 100_000)
    with pytest.raises(PackError, match=r"does not have the \d+ bytes of"):
        open_pack(pack.path.parent)
    (source / "model.safetensors").unlink()
    with pytest.raises(PackError, match="does not have"):
        open_pack(pack.path.parent)


def test_a_pack_in_place_does_not_pass_for_a_written_one(tmp_path: Path, source: Path) -> None:
    pack_source(source, tmp_path, in_place=True)
    pack = pack_source(source, tmp_path)
    assert in_place(pack) == set()
    assert pack_source(source, tmp_path, in_place=True) == pack
