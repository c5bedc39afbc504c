"""Rows of an embedding are the library's own, wherever they lie."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import pytest
import torch
from torch import nn
from transformers.models.gemma3 import modeling_gemma3

from engine.errors import EngineError, PackError
from engine.memory.checksums import chunk_checksums
from engine.memory.embedding import EmbeddingTable, RowReader
from engine.memory.kinds import Kind
from engine.memory.manifest import DATA_FILE, MANIFEST_FILE, Pack, place_group, write_manifest
from engine.memory.matrix import Slice
from engine.memory.placement import whole_piece
from engine.timeline import Timeline, Track

CPU: Final = torch.device("cpu")
VALUES: Final = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
OFFSET_BYTES: Final = 4096
IDS: Final = torch.tensor([[0, 49, 7, 7, 19, 20, 0]])

HELD: Final = {"nothing": (), "some": ((0, 20),), "two": ((0, 8), (8, 30)), "all": ((0, 50),)}


def write_pack(folder: Path, values: torch.Tensor) -> Pack:
    """A pack of one table, behind a page of nothing."""
    path = folder / DATA_FILE
    raw = values.view(torch.uint8).reshape(-1)
    path.write_bytes(bytes(OFFSET_BYTES) + raw.numpy().tobytes())
    group = place_group("embed", path, OFFSET_BYTES, {"table": values})
    tensor = dataclasses.replace(group.tensors[0], checksums=chunk_checksums(raw))
    groups = (dataclasses.replace(group, tensors=(tensor,)),)
    write_manifest(groups, folder)
    return Pack.at(folder, groups)


def reader_of(pack: Pack, timeline: Timeline) -> RowReader:
    [group] = pack.groups
    return RowReader(pack, whole_piece(group, group.tensors[0], Kind.TABLE), timeline)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[RowReader]:
    reader = reader_of(write_pack(tmp_path, VALUES), Timeline())
    yield reader
    reader.close()


def table_of(held: Sequence[tuple[int, int]], reader: RowReader | None) -> EmbeddingTable:
    slices = []
    for first, last in held:
        slices.append(Slice(first, last))
        slices[-1].bind(VALUES[first:last])
    is_whole = sum(last - first for first, last in held) == len(VALUES)
    return EmbeddingTable(
        VALUES.shape,
        held=slices,
        reader=None if is_whole else reader,
        dtype=torch.float32,
        device=CPU,
    )


def embedding(weight: Any, kind: type[nn.Embedding] = nn.Embedding, **options: Any) -> Any:
    module: Any = kind(50, 12, padding_idx=3, **options)
    del module.weight
    module.weight = weight
    return module


@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_the_librarys_lookup_finds_every_row(
    held: Sequence[tuple[int, int]], reader: RowReader
) -> None:
    module = embedding(table_of(held, reader))
    with torch.inference_mode():
        found = module(IDS)
    assert found.dtype == torch.float32
    assert torch.equal(found, VALUES[IDS].float())


@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_a_single_row_may_be_asked_for_by_its_index(
    held: Sequence[tuple[int, int]], reader: RowReader
) -> None:
    table = table_of(held, reader)
    for row in (0, 20, 49):
        assert torch.equal(table[row], VALUES[row].float())
        assert torch.equal(table[row, :], VALUES[row].float())


def test_a_subclass_that_scales_what_it_looks_up_still_does(reader: RowReader) -> None:
    kind = modeling_gemma3.Gemma3TextScaledWordEmbedding
    module = embedding(table_of((), reader), kind, embed_scale=3.0)
    assert torch.equal(module(IDS), VALUES[IDS].float() * 3)


def test_each_row_asked_for_is_read_once_and_no_other(tmp_path: Path) -> None:
    timeline = Timeline()
    reader = reader_of(write_pack(tmp_path, VALUES), timeline)
    embedding(table_of(((0, 20),), reader))(IDS)
    reader.close()
    assert reader.num_bytes == timeline.totals()[Track.DISK_READ].num_bytes == 2 * 24  # 20 and 49


def test_a_file_cut_short_is_an_error_with_the_numbers(tmp_path: Path, reader: RowReader) -> None:
    os.truncate(tmp_path / DATA_FILE, OFFSET_BYTES + 30 * 24)
    with pytest.raises(EngineError, match=r"ended early: 720 of 1200 bytes"):
        embedding(table_of((), reader))(IDS)
    assert (tmp_path / MANIFEST_FILE).exists()


def test_a_mebibyte_is_checked_when_its_first_row_is_read_and_never_again(tmp_path: Path) -> None:
    values = torch.randn(2200, 600).bfloat16()  # 1,200 bytes a row: row 873 lies in two
    timeline = Timeline()
    with contextlib.closing(reader_of(write_pack(tmp_path, values), timeline)) as reader:
        for rows, num_bytes in (
            ([5], 2**20),
            ([6, 800, 0], 2**20),
            ([873], 2 * 2**20),
            ([2199, 1500], 2200 * 1200),
            ([873, 5], 2200 * 1200),
        ):
            assert torch.equal(reader.read(rows), values[rows])
            assert timeline.totals()[Track.LOADING].num_bytes == num_bytes
    assert timeline.totals()[Track.DISK_READ].num_bytes == 9 * 1200


def test_rows_of_a_damaged_mebibyte_are_refused_and_the_pack_given_up(tmp_path: Path) -> None:
    values = torch.randn(2200, 600).bfloat16()
    pack = write_pack(tmp_path, values)
    with pack.path.open("r+b") as file:
        file.seek(OFFSET_BYTES + 1000 * 1200)
        file.write(b"\xff\xff\xff\xff")
    with contextlib.closing(reader_of(pack, Timeline())) as reader:
        assert torch.equal(reader.read([0, 2100]), values[[0, 2100]])
        assert (tmp_path / MANIFEST_FILE).exists()
        for row in (873, 1001):  # no row of it, at no time
            with pytest.raises(PackError, match=r"table in embed .* will be written anew"):
                reader.read([0, row])
    assert not (tmp_path / MANIFEST_FILE).exists()


def test_a_table_taken_for_a_tensor_is_refused(reader: RowReader) -> None:
    with pytest.raises(TypeError):
        torch.nn.functional.linear(torch.randn(1, 12), cast("Any", table_of((), reader)))
