"""Reads what stays in memory from a pack, checked as it comes. Knows no models and no schedule."""

from typing import Final

import torch

from engine.memory.manifest import Pack, PackedTensor, PackGroup
from engine.memory.pack import crc32_of, require_checksum
from engine.memory.placement import Piece, Span
from engine.memory.tiers import PAGE_BYTES, DirectReader, HostBuffer
from engine.timeline import Timeline, Track

_CHUNK_BYTES: Final = 32 * 2**20


class Loader:
    """Reads pieces and spans of one pack. A tensor's pieces come in order, and its checksum is
    compared with the manifest's when the last of them does. Not thread-safe.
    """

    def __init__(self, pack: Pack, reader: DirectReader, timeline: Timeline) -> None:
        self._pack = pack
        self._reader = reader
        self._timeline = timeline
        self._checksums: dict[str, int] = {}  # of tensors whose pieces were not all read yet

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
        name = span.pieces[0].group.name
        with self._timeline.span(track, name, num_bytes=span.num_bytes):
            self._reader.read(buffer, offset_bytes=span.offset_bytes, num_bytes=span.num_bytes)

    def check(self, span: Span, buffer: HostBuffer) -> None:
        """PackError if a tensor that ends in the span differs from what was written."""
        for piece in span.pieces:
            name = piece.tensor.name
            if piece.first and name not in self._checksums:
                continue  # rows before these are read one by one, when tokens ask for them
            before = self._checksums.pop(name, 0)
            checksum = crc32_of(span.view(piece, buffer.bytes), before)
            if piece.is_last:
                require_checksum(self._pack, piece.group, piece.tensor, checksum)
            else:
                self._checksums[name] = checksum
