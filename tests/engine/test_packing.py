"""The pack as it is written: in bounded memory, resumable, within its room."""

import errno
import itertools
import json
import os
import random
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.errors import BudgetError, PackError
from engine.memory.checkpoint import open_checkpoint
from engine.memory.manifest import Pack
from engine.memory.pack import RangeChecker, check_range, verify
from engine.memory.pack_plan import PackPlan
from engine.memory.packing import partial_folder
from engine.memory.retention import PackHold, kept_packs, prune_packs
from tests.support.packing import (
    pack_and_die,
    pack_source,
    peak_bytes_of_packing,
    write_large_model,
)
from tests.support.tiny_models import write_tiny_model

MIB = 2**20


def files_of(pack: Pack) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pack.path.parent.iterdir()}


# -- memory ------------------------------------------------------------------------------------


def test_memory_grows_by_the_largest_tensor_and_not_by_a_layer(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=3,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    source = write_large_model(tmp_path / "source", config)
    largest_bytes, layer_bytes = 32 * MIB, 112 * MIB
    peak_bytes = peak_bytes_of_packing(source, tmp_path)
    assert largest_bytes <= peak_bytes < largest_bytes + 48 * MIB < layer_bytes


def test_memory_grows_by_one_fused_tensor_where_the_library_fuses(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=1024,
        num_local_experts=8,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    source = write_large_model(tmp_path / "source", config)
    fused_bytes = 2 * 8 * 4 * MIB
    # The library holds the experts one by one, stacked, and joined.
    assert peak_bytes_of_packing(source, tmp_path) < 3 * fused_bytes + 64 * MIB < 4 * 100 * MIB


# -- interruptions -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source"), "mixtral")


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(pack_source(source, tmp_path_factory.mktemp("whole")))


def test_a_packing_killed_again_and_again_ends_in_the_same_bytes(
    tmp_path: Path, source: Path, uninterrupted: dict[str, bytes]
) -> None:
    draw = random.Random(7)
    num_deaths = 0
    while pack_and_die(source, tmp_path, at_operation=draw.randrange(3, 25)):
        num_deaths += 1
        assert num_deaths < 30, "it does not come forward"
        assert [pack.path.suffix for pack in kept_packs(tmp_path)] == [".partial"]
    assert num_deaths >= 2
    assert files_of(pack_source(source, tmp_path)) == uninterrupted


@pytest.mark.parametrize("at_operation", random.Random(3).sample(range(45), 8))
def test_a_packing_killed_at_any_point_goes_on_to_the_same_bytes(
    tmp_path: Path, source: Path, uninterrupted: dict[str, bytes], at_operation: int
) -> None:
    assert pack_and_die(source, tmp_path, at_operation=at_operation)
    told: list[PackPlan] = []
    assert files_of(pack_source(source, tmp_path, announce=told.append)) == uninterrupted
    if at_operation > 20:
        assert told[0].resumes_from_bytes > 0


def test_what_was_written_is_not_read_from_the_source_again(tmp_path: Path, source: Path) -> None:
    assert pack_and_die(source, tmp_path, at_operation=30)
    told: list[PackPlan] = []
    seen: list[int] = []
    pack = pack_source(
        source, tmp_path, announce=told.append, progress=lambda done, _: seen.append(done)
    )
    assert told[0].to_write_bytes + told[0].resumes_from_bytes == told[0].num_bytes
    assert told[0].num_bytes == pack.num_bytes == seen[-1]


def test_journalled_bytes_that_the_disk_does_not_have_are_written_again(
    tmp_path: Path, source: Path, uninterrupted: dict[str, bytes]
) -> None:
    assert pack_and_die(source, tmp_path, at_operation=40)
    data = next(tmp_path.glob("packs/*.partial/weights.bin"))
    for offset in (100, data.stat().st_size // 2):
        with data.open("r+b") as file:
            file.seek(offset)
            file.write(b"lost to a power failure")
    assert files_of(pack_source(source, tmp_path)) == uninterrupted


@pytest.mark.parametrize("cut_bytes", [1, 100, 10_000])
def test_a_journal_that_was_cut_off_is_believed_as_far_as_it_goes(
    tmp_path: Path, source: Path, uninterrupted: dict[str, bytes], cut_bytes: int
) -> None:
    assert pack_and_die(source, tmp_path, at_operation=40)
    journal = next(tmp_path.glob("packs/*.partial/journal.jsonl"))
    os.truncate(journal, max(0, journal.stat().st_size - cut_bytes))
    assert files_of(pack_source(source, tmp_path)) == uninterrupted


def test_a_changed_source_goes_on_from_nobodys_partial(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "source", "mixtral")
    assert pack_and_die(folder, tmp_path, at_operation=40)
    write_tiny_model(tmp_path / "source", "mixtral", seed=1)
    told: list[PackPlan] = []
    pack = pack_source(folder, tmp_path, announce=told.append)
    assert told[0].resumes_from_bytes == 0
    assert files_of(pack) == files_of(pack_source(folder, tmp_path / "other"))


def test_a_partial_of_another_plan_is_not_gone_on_from(
    tmp_path: Path, source: Path, uninterrupted: dict[str, bytes]
) -> None:
    assert pack_and_die(source, tmp_path, at_operation=40)
    journal = next(tmp_path.glob("packs/*.partial/journal.jsonl"))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"00000000 {}\n" + b"".join(lines[1:]))
    told: list[PackPlan] = []
    assert files_of(pack_source(source, tmp_path, announce=told.append)) == uninterrupted
    assert told[0].resumes_from_bytes == 0


def test_bytes_that_an_interrupted_packing_left_count_as_spent(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pack_and_die(source, tmp_path, at_operation=40)
    whole: list[PackPlan] = []
    pack_source(source, tmp_path / "other", announce=whole.append)
    # Free is less than the whole pack needs, and enough for what is not there yet.
    free_bytes = whole[0].num_bytes - 100_000
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free_bytes}))
    with pytest.raises(BudgetError, match=rf"has {free_bytes} free"):
        pack_source(source, tmp_path / "third")
    verify(pack_source(source, tmp_path))


def test_a_disk_that_fills_up_is_a_budget_error_and_what_was_written_is_kept(
    tmp_path: Path,
    source: Path,
    uninterrupted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[int] = []

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        if sum(written) + len(data) > 500_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(data))
        return os.pwrite(file, data, offset)

    fake = types.SimpleNamespace(**{**vars(os), "pwrite": pwrite})
    with monkeypatch.context() as patch:
        patch.setattr("engine.memory.packing.os", fake)
        with pytest.raises(BudgetError, match=r"No space left .* bytes to write"):
            pack_source(source, tmp_path)
    told: list[PackPlan] = []
    assert files_of(pack_source(source, tmp_path, announce=told.append)) == uninterrupted
    assert told[0].resumes_from_bytes > 0


# -- room --------------------------------------------------------------------------------------


def sources(folder: Path, count: int) -> list[Path]:
    return [write_tiny_model(folder / f"s{seed}", "llama", seed=seed) for seed in range(count)]


def test_the_cost_is_told_before_a_byte_is_written(tmp_path: Path) -> None:
    [folder] = sources(tmp_path, 1)
    told: list[PackPlan] = []

    def announce(plan: PackPlan) -> None:
        assert not plan.path.exists()
        assert not partial_folder(plan.path).exists()
        told.append(plan)

    pack = pack_source(folder, tmp_path, announce=announce, disk_bytes=123_456_789)
    pack_source(folder, tmp_path, announce=announce)
    [plan] = told  # nothing to tell the second time
    assert plan.to_write_bytes == plan.num_bytes == pack.num_bytes
    assert f"{pack.num_bytes:,} bytes to write" in str(plan)
    assert "budget is 123,456,789" in str(plan)


def test_longest_unused_packs_make_room_when_the_budget_lacks_it(tmp_path: Path) -> None:
    folders = sources(tmp_path, 4)
    packs = [pack_source(folder, tmp_path) for folder in folders[:3]]
    for pack, used_at_s in zip(packs, (2000, 1000, 3000), strict=True):
        os.utime(pack.path.parent, (used_at_s, used_at_s))
    room = sum(kept.num_bytes for kept in kept_packs(tmp_path)) + 50_000
    newest = pack_source(folders[3], tmp_path, disk_bytes=room)
    assert {kept.path for kept in kept_packs(tmp_path)} == {
        packs[0].path.parent,
        packs[2].path.parent,
        newest.path.parent,
    }


def test_nothing_is_removed_where_that_would_not_make_room_enough(tmp_path: Path) -> None:
    folders = sources(tmp_path, 2)
    pack = pack_source(folders[0], tmp_path)
    with pytest.raises(BudgetError, match=r"other packs take \d+, of which \d+ could go"):
        pack_source(folders[1], tmp_path, disk_bytes=1000)
    verify(pack)


def test_a_pack_that_is_read_is_never_removed(tmp_path: Path) -> None:
    folders = sources(tmp_path, 2)
    pack = pack_source(folders[0], tmp_path)
    hold = PackHold(pack.path.parent)
    with pytest.raises(BudgetError, match="of which 0 could go"):
        pack_source(folders[1], tmp_path, disk_bytes=pack.num_bytes + 1000)
    assert prune_packs(tmp_path, ()) == 0
    verify(pack)
    hold.close()
    hold.close()
    assert prune_packs(tmp_path, ()) >= pack.num_bytes
    assert kept_packs(tmp_path) == []
    with pytest.raises(PackError, match="is gone"):
        PackHold(pack.path.parent)


def test_a_partial_is_pruned_unless_it_is_kept_or_being_written(
    tmp_path: Path, source: Path
) -> None:
    assert pack_and_die(source, tmp_path, at_operation=40)
    identity = open_checkpoint(source).identity
    assert prune_packs(tmp_path, {identity}) == 0
    seen: list[int] = []
    pack_source(
        source, tmp_path, progress=lambda _done, _total: seen.append(prune_packs(tmp_path, ()))
    )
    assert set(seen) == {0}


def test_a_removal_that_was_interrupted_is_finished(tmp_path: Path, source: Path) -> None:
    pack = pack_source(source, tmp_path)
    pack.path.parent.rename(f"{pack.path.parent}.removing")
    assert prune_packs(tmp_path, ()) > 0
    assert kept_packs(tmp_path) == []


# -- checksums by slices -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Its first layer's largest tensors are of three and a half chunks."""
    folder = tmp_path_factory.mktemp("sliced")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    return pack_source(write_large_model(folder / "source", config), folder)


def group_bytes(pack: Pack, name: str) -> torch.Tensor:
    group = pack.group(name)
    raw = pack.path.read_bytes()[group.offset_bytes : group.offset_bytes + group.num_bytes]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def outcome(pack: Pack, data: torch.Tensor, start: int, end: int) -> Any:
    manifest = pack.path.with_name("manifest.json").read_bytes()
    try:
        return check_range(pack, pack.group("layers.0"), start, data[start:end])
    except PackError as error:
        pack.path.with_name("manifest.json").write_bytes(manifest)
        return str(error)


def test_any_slice_of_a_group_is_checked_by_the_chunks_that_lie_in_it(sliced: Pack) -> None:
    whole = group_bytes(sliced, "layers.0")
    tensor = next(t for t in sliced.group("layers.0").tensors if "up_proj" in t.name)
    assert tensor.num_bytes == 3.5 * MIB
    draw = random.Random(1)
    for _ in range(60):
        place = draw.randrange(tensor.num_bytes)
        damaged = whole.clone()
        damaged[tensor.offset_bytes + place] ^= 1
        start = draw.randrange(len(whole) - 1)
        end = draw.randrange(start + 1, len(whole))
        chunk_start = tensor.offset_bytes + place // MIB * MIB
        chunk_end = min(chunk_start + MIB, tensor.offset_bytes + tensor.num_bytes)
        found = outcome(sliced, damaged, start, end)
        assert (found is not None) == (start <= chunk_start and chunk_end <= end)
        assert found is None or tensor.name in found
        assert outcome(sliced, whole, start, end) is None


@pytest.mark.parametrize("place", [0, MIB - 1, MIB, 2 * MIB + 7, 3 * MIB + MIB // 2 - 1])
def test_slices_that_adjoin_are_checked_across_their_borders(sliced: Pack, place: int) -> None:
    group = sliced.group("layers.0")
    tensor = next(t for t in group.tensors if "up_proj" in t.name)
    whole = group_bytes(sliced, "layers.0")[tensor.offset_bytes :][: tensor.num_bytes]
    manifest = sliced.path.with_name("manifest.json").read_bytes()
    borders = [0, 3000, MIB + 5, MIB + 6, 2 * MIB, 3 * MIB + 17, tensor.num_bytes]
    checker = RangeChecker(sliced)

    def check_all(data: torch.Tensor) -> None:
        for start, end in itertools.pairwise(borders):
            checker.check(group, tensor, start, data[start:end])

    check_all(whole)
    damaged = whole.clone()
    damaged[place] ^= 1
    with pytest.raises(PackError, match=tensor.name):
        check_all(damaged)
    sliced.path.with_name("manifest.json").write_bytes(manifest)


def test_a_slice_that_does_not_adjoin_is_checked_from_the_next_chunk_on(sliced: Pack) -> None:
    group = sliced.group("layers.0")
    tensor = next(t for t in group.tensors if "up_proj" in t.name)
    whole = group_bytes(sliced, "layers.0")[tensor.offset_bytes :][: tensor.num_bytes]
    checker = RangeChecker(sliced)
    checker.check(group, tensor, 0, whole[:100])
    checker.check(group, tensor, 200, whole[200:])
    checker.check(group, tensor, 0, whole)


def test_the_manifest_has_a_checksum_for_each_mebibyte_of_each_tensor(sliced: Pack) -> None:
    manifest = json.loads(sliced.path.with_name("manifest.json").read_text())
    for group in manifest:
        for tensor in group["tensors"]:
            assert len(tensor["checksums"]) == -(-tensor["num_bytes"] // MIB)
