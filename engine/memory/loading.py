"""Reads what stays in memory from a pack, checked as it comes. Knows no models and no schedule."""

import contextlib
from pathlib import Path
from typing import Final

import torch

from engine.memory.manifest import Pack, PackedTensor, PackGroup
from engine.memory.pack import RangeChecker
from engine.memory.placement import Piece, Span
from engine.memory.source import bytes_of
from engine.memory.tiers import PAGE_BYTES, DirectReader, HostBuffer, page_floor
from engine.timeline import Timeline, Track

_CHUNK_BYTES: Final = 32 * 2**20


class Loader:
    """Reads pieces and spans of one pack, from its own file and from those of the source that are
    read in place. Not thread-safe. Close it. Raises OSError for a file that cannot be opened.
    """

    def __init__(self, pack: Pack, timeline: Timeline) -> None:
        self._timeline = timeline
        self._checker = RangeChecker(pack)
        self._readers: dict[Path, DirectReader] = {}
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for path in {group.path for group in pack.groups}:
                self._readers[path] = DirectReader(path)
            undo.pop_all()

    def load_tensor(self, group: PackGroup, tensor: PackedTensor) -> torch.Tensor:
        """In plain host memory, in stored dtype."""
        piece = Piece(group=group, tensor=tensor, first=0, last=1, row_bytes=tensor.num_bytes)
        return self._load_here(piece)

    def load_piece(self, piece: Piece, device: torch.device) -> torch.Tensor:
        """On the device, in stored dtype, in memory of its own."""
        if device.type == "cpu":
            return self._load_here(piece)
        loaded = torch.empty(piece.shape, dtype=piece.tensor.dtype, device=device)
        parts = piece.cut(max(1, _CHUNK_BYTES // piece.row_bytes))
        for chunk in parts:
            rows = slice(chunk.first - piece.first, chunk.last - piece.first)
            target = loaded if len(parts) == 1 else loaded[rows]
            target.copy_(self._load_here(chunk))
        return loaded

    def _load_here(self, piece: Piece) -> torch.Tensor:
        buffer = HostBuffer(piece.num_bytes + 2 * PAGE_BYTES)
        span = Span((piece,))
        self.read(span, buffer)
        self.check(span, buffer)
        return span.view(piece, buffer.bytes)

    def read(self, span: Span, buffer: HostBuffer, track: Track = Track.LOADING) -> None:
        """Into the buffer, which then starts with the span's first page. Raises OSError."""
        if not span.pieces:
            return
        group = span.pieces[0].group
        with self._timeline.span(track, group.name, num_bytes=span.num_bytes):
            reader = self._readers[group.path]
            reader.read(buffer, offset_bytes=span.offset_bytes, num_bytes=span.num_bytes)

    def read_part(self, part: Span, whole: Span, buffer: HostBuffer) -> None:
        """Of streamed weights, into where a read of the whole span would leave it. Raises OSError."""
        at = page_floor(part.offset_bytes) - page_floor(whole.offset_bytes)
        self.read(part, HostBuffer(len(buffer.view) - at, buffer.view[at:]), Track.DISK_READ)

    def check(self, span: Span, buffer: HostBuffer, *, part: Span | None = None) -> None:
        """Compare what was read of the span, or of a part of it, with the manifest's checksums.

        Raises PackError, CheckpointError.
        """
        for piece in (part or span).pieces:
            data = bytes_of(span.view(piece, buffer.bytes))
            self._checker.check(piece.group, piece.tensor, piece.first * piece.row_bytes, data)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
