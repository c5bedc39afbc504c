"""Checksums of weights in pieces of 1 MiB, so that a slice of a tensor can be checked as it is read.

Bytes that were never read before have no checksum yet: it is taken at the first read and kept.
Knows tensors by name only, nothing of packs or files of weights.
"""

import re
import threading
import zlib
from pathlib import Path
from typing import Final

import torch

CHUNK_BYTES: Final = 2**20

_LINE: Final = re.compile(r"^(\S+) (\d+) ([0-9a-f]{8})$", re.MULTILINE)


def checksum(data: torch.Tensor, before: int = 0) -> int:
    """CRC-32 of a flat uint8 tensor in host memory; `before` is that of what comes before it."""
    return zlib.crc32(data.numpy().data, before)


def chunk_checksums(data: torch.Tensor) -> tuple[int, ...]:
    """Of each 1 MiB of a tensor's bytes, counted from its start; the last may be shorter."""
    return tuple(
        checksum(data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)
    )


class LearnedChecksums:
    """Checksums taken when bytes were first read, kept in a text file from one run to the next.

    Trust on first use: what is read first is taken to be right. Safe to use from several threads
    and processes. A line that was cut off by a crash is no loss: its chunk is learned again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()
        if path.is_file():
            self._recall(path.read_text())

    def expected(self, tensor: str, chunk: int, found: int) -> int:
        """What the chunk's checksum was when it was first read: `found`, if that is now."""
        with self._lock:
            if (tensor, chunk) not in self._known:
                self._known[tensor, chunk] = found
                self._keep(tensor, chunk, found)
            return self._known[tensor, chunk]

    def _keep(self, tensor: str, chunk: int, value: int) -> None:
        """One short append, which is whole beside those of other processes."""
        with self._path.open("a") as file:
            file.write(f"{tensor} {chunk} {value:08x}\n")

    def _recall(self, text: str) -> None:
        for tensor, chunk, value in _LINE.findall(text):
            self._known.setdefault((tensor, int(chunk)), int(value, 16))
        if text and not text.endswith("\n"):
            with self._path.open("a") as file:
                file.write("\n")  # ends the line that was cut off
