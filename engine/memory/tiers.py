"""Where bytes live: host buffers and direct reads from disk into them; knows nothing of weights."""

import concurrent.futures
import dataclasses
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

PAGE_BYTES: Final = 4096
_CHUNK_BYTES: Final = 8 * 2**20
_READ_THREADS: Final = 4


class HostBuffer:
    """A page-aligned host buffer that direct reads may land in; pinned where a GPU will copy it."""

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        if pinned:
            # torch's pinned allocations are page-aligned, but rounded up to a power of two.
            self.bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            self.view = memoryview(self.bytes.numpy().data)
        else:
            self.view = memoryview(mmap.mmap(-1, max(num_bytes, 1)))[:num_bytes]
            self.bytes = torch.frombuffer(self.view, dtype=torch.uint8)


@dataclasses.dataclass(slots=True)
class ReadCounters:
    """What a reader did so far."""

    num_bytes: int = 0
    num_reads: int = 0


class DirectReader:
    """Reads ranges of one file past the page cache, in large pieces by several threads.

    A cyclic scan larger than memory gets nothing from a page cache and pays for it twice. Where the
    file system has no direct I/O the reads are plain and the cache is told to let go. Close it.
    """

    def __init__(self, path: Path) -> None:
        self.counters = ReadCounters()
        self._path = path
        self._plain = os.open(path, os.O_RDONLY)
        self._file = self._open_direct(path)
        self._is_direct = self._file != self._plain
        self._open = {self._plain, self._file}
        self._pool = concurrent.futures.ThreadPoolExecutor(_READ_THREADS, "freight-read")

    def _open_direct(self, path: Path) -> int:
        """The file past the page cache; where opening or reading so is refused, the plain one."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            return self._plain
        try:
            with mmap.mmap(-1, PAGE_BYTES) as page:
                os.preadv(file, [page], 0)
        except OSError:
            os.close(file)
            return self._plain
        return file

    def read(self, buffer: HostBuffer, *, offset_bytes: int, num_bytes: int) -> torch.Tensor:
        """The range, as a uint8 view into `buffer`, which must hold it and two pages more.

        Raises OSError, also for a file that ended early.
        """
        if num_bytes == 0:
            return buffer.bytes[:0]
        start = offset_bytes // PAGE_BYTES * PAGE_BYTES
        end = -(-(offset_bytes + num_bytes) // PAGE_BYTES) * PAGE_BYTES
        pieces = [
            self._pool.submit(
                self._read_piece, buffer, position, min(_CHUNK_BYTES, end - position), start
            )
            for position in range(start, end, _CHUNK_BYTES)
        ]
        got = sum(piece.result() for piece in pieces)
        skipped = offset_bytes - start
        if got < skipped + num_bytes:
            raise OSError(
                f"{self._path} ended early: {skipped + num_bytes} bytes wanted from {start}, got {got}"
            )
        self.counters.num_bytes += num_bytes
        self.counters.num_reads += len(pieces)
        return buffer.bytes[skipped : skipped + num_bytes]

    def _read_piece(self, buffer: HostBuffer, position: int, num_bytes: int, start: int) -> int:
        target = buffer.view[position - start : position - start + num_bytes]
        got = 0
        while got < num_bytes:
            # A direct read must start on a page; only the end of the file can break that.
            source = self._file if got % PAGE_BYTES == 0 else self._plain
            count = os.preadv(source, [target[got:]], position + got)
            if count == 0:
                break
            got += count
        if not self._is_direct:
            os.posix_fadvise(self._plain, position, num_bytes, os.POSIX_FADV_DONTNEED)
        return got

    def close(self) -> None:
        self._pool.shutdown()
        while self._open:  # empty when closed before: the numbers may be other files' by now
            os.close(self._open.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
