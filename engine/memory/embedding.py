"""The embedding's rows, from where each lies: memory of any tier, or the pack file as tokens ask.

It stands in for an `nn.Embedding`'s weight: the library's own lookup finds its way here.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F

from engine.errors import EngineError
from engine.memory.manifest import Pack
from engine.memory.matrix import Slice
from engine.memory.placement import Piece
from engine.memory.touched import TouchedChunks
from engine.timeline import Timeline, Track

_READ_THREADS: Final = 4


class RowReader:
    """Reads single rows of a whole matrix of a pack by several threads. Close it.

    The 1 MiB of the matrix that a row lies in are checked when the first row of them is read.
    """

    def __init__(self, pack: Pack, piece: Piece, timeline: Timeline) -> None:
        self.num_bytes = 0
        self._piece = piece
        self._chunks = TouchedChunks(pack, piece.group, piece.tensor, timeline)
        self._timeline = timeline
        self._path = piece.group.path
        self._file: int | None = os.open(self._path, os.O_RDONLY)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        self._pool = concurrent.futures.ThreadPoolExecutor(_READ_THREADS, "freight-rows")

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """(rows, columns) in stored dtype. Raises EngineError for what cannot be read, PackError or
        CheckpointError for what is damaged.
        """
        piece = self._piece
        self._check(rows)
        raw = torch.empty(len(rows) * piece.row_bytes, dtype=torch.uint8)
        view = memoryview(raw.numpy().data)
        with self._timeline.span(Track.DISK_READ, "embedding rows", num_bytes=len(view)):
            shares = [range(start, len(rows), _READ_THREADS) for start in range(_READ_THREADS)]
            _finish(self._pool.submit(self._read_some, rows, view, share) for share in shares)
        self.num_bytes += len(view)
        return raw.view(piece.tensor.dtype).view(len(rows), *piece.tensor.shape[1:])

    def _read_some(self, rows: Sequence[int], view: memoryview, places: range) -> None:
        assert self._file is not None, "a closed engine embeds nothing"
        size = self._piece.row_bytes
        for place in places:
            target = view[place * size : (place + 1) * size]
            got = os.preadv(self._file, [target], self._piece.offset_bytes + rows[place] * size)
            if got < size:
                raise OSError(f"{self._path} ended early: {size} bytes of row {rows[place]} wanted")

    def _check(self, rows: Sequence[int]) -> None:
        size = self._piece.row_bytes
        ranges = ((row * size, (row + 1) * size - 1) for row in rows)
        touched = set().union(*(self._chunks.unchecked(first, last) for first, last in ranges))
        _finish(self._pool.submit(self._chunks.check, chunk) for chunk in touched)

    def close(self) -> None:
        self._pool.shutdown()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _finish(jobs: Iterable[concurrent.futures.Future[None]]) -> None:
    """Wait for all; raise what the first raised that did."""
    begun = list(jobs)
    concurrent.futures.wait(begun)
    try:
        for job in begun:
            job.result()
    except OSError as error:
        raise EngineError(f"rows of the embedding cannot be read: {error}") from error


class EmbeddingTable:
    """Tensor-like for `F.embedding`: rows of `held` slices from there, all others by `reader`.

    What comes out is on `device` in `dtype`, (..., columns) for ids (...).
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        held: Sequence[Slice],
        reader: RowReader | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device
        self._held = held
        self._reader = reader
        assert reader is not None or sum(part.last - part.first for part in held) == shape[0]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        if self._reader is None and len(self._held) == 1:
            table = self._held[0].stored
            return F.embedding(ids.to(table.device), table).to(self.device, self.dtype)
        unique, places = torch.unique(ids.cpu(), return_inverse=True)
        found = self._unique_rows(unique).to(self.device, self.dtype)
        return F.embedding(places.to(self.device), found)

    def __getitem__(self, index: int | tuple[int, slice]) -> torch.Tensor:
        """One row, (columns,), or a cut of it: some models look up their padding so."""
        row, columns = index if isinstance(index, tuple) else (index, slice(None))
        return self.rows(torch.tensor([row]))[0, columns]

    def _unique_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of ascending ids, in host memory, in stored dtype."""
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        missing = torch.ones_like(ids, dtype=torch.bool)
        for part in self._held:
            is_here = (ids >= part.first) & (ids < part.last)
            missing &= ~is_here
            at = (ids[is_here] - part.first).to(part.stored.device)
            parts.append((is_here, part.stored.index_select(0, at).cpu()))
        if self._reader is not None:
            parts.append((missing, self._reader.read(ids[missing].tolist())))
        rows = torch.empty((len(ids), self.shape[1]), dtype=parts[0][1].dtype)
        for is_here, values in parts:
            rows[is_here] = values
        return rows

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """`F.embedding(ids, self)` and nothing else: torch raises TypeError for other functions."""
        if function is not F.embedding:
            return NotImplemented
        ids, table = arguments
        return table.rows(ids)
