"""Rows of an embedding are the library's own, wherever they lie."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import pytest
import torch
from torch import nn
from transformers.models.gemma3 import modeling_gemma3

from engine.errors import EngineError
from engine.memory.embedding import EmbeddingTable, RowReader
from engine.memory.kinds import Kind
from engine.memory.manifest import PackGroup, place_group
from engine.memory.matrix import Slice
from engine.memory.placement import Piece, whole_piece
from engine.timeline import Timeline, Track

CPU: Final = torch.device("cpu")
VALUES: Final = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
OFFSET_BYTES: Final = 4096
IDS: Final = torch.tensor([[0, 49, 7, 7, 19, 20, 0]])

HELD: Final = {"nothing": (), "some": ((0, 20),), "two": ((0, 8), (8, 30)), "all": ((0, 50),)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(OFFSET_BYTES) + VALUES.view(torch.uint8).numpy().tobytes())
    return path


def piece() -> Piece:
    path = Path("not opened here")
    group: PackGroup = place_group("embed", path, OFFSET_BYTES, {"table": VALUES})
    return whole_piece(group, group.tensors[0], Kind.TABLE)


@pytest.fixture
def reader(path: Path) -> Iterator[RowReader]:
    reader = RowReader(path, piece(), Timeline())
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


def test_each_row_asked_for_is_read_once_and_no_other(path: Path) -> None:
    timeline = Timeline()
    reader = RowReader(path, piece(), timeline)
    embedding(table_of(((0, 20),), reader))(IDS)
    reader.close()
    assert reader.num_bytes == timeline.totals()[Track.DISK_READ].num_bytes == 2 * 24  # 20 and 49


def test_a_file_cut_short_is_an_error_with_the_row(path: Path, reader: RowReader) -> None:
    os.truncate(path, OFFSET_BYTES + 30 * 24)
    with pytest.raises(EngineError, match=r"rows of the embedding cannot be read: .* row 49 "):
        embedding(table_of((), reader))(IDS)


def test_a_table_taken_for_a_tensor_is_refused(reader: RowReader) -> None:
    with pytest.raises(TypeError):
        torch.nn.functional.linear(torch.randn(1, 12), cast("Any", table_of((), reader)))
