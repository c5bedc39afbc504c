"""Where bytes live: host buffers and direct reads from disk into them; knows nothing of weights."""

import concurrent.futures
import contextlib
import dataclasses
import logging
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

PAGE_BYTES: Final = 4096
_NO_BYTES: Final = torch.empty(0, dtype=torch.uint8)
_CHUNK_BYTES: Final = 8 * 2**20
_READ_THREADS: Final = 4


_log = logging.getLogger(__name__)


def page_floor(offset_bytes: int) -> int:
    return offset_bytes // PAGE_BYTES * PAGE_BYTES


def page_aligned(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


class HostBuffer:
    """A page-aligned host buffer that direct reads may land in: memory of its own, or a given part
    of an arena's.
    """

    def __init__(self, num_bytes: int, part: memoryview | None = None) -> None:
        own = memoryview(mmap.mmap(-1, max(num_bytes, 1))) if part is None else part
        self.view = own[:num_bytes]
        self.bytes = torch.frombuffer(self.view, dtype=torch.uint8) if num_bytes else _NO_BYTES


class HostArena:
    """One stretch of host memory that buffers are cut from; pinned where a GPU will copy them.

    It is pinned as a whole, because torch rounds each pinned allocation up to a power of two. Where
    the driver refuses, torch allocates it after all, with a warning. Close it when no copy runs.
    """

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        num_bytes = max(num_bytes, 1)
        self._registered: int | None = None
        self._whole = memoryview(mmap.mmap(-1, num_bytes))
        self._used_bytes = 0
        if pinned:
            self._pin(num_bytes)

    def take(self, num_bytes: int) -> HostBuffer:
        """The next `num_bytes`, from a page border on."""
        start = self._used_bytes
        self._used_bytes += page_aligned(num_bytes)
        assert start + num_bytes <= len(self._whole), "an arena is as large as all its buffers"
        return HostBuffer(num_bytes, self._whole[start : start + num_bytes])

    def _pin(self, num_bytes: int) -> None:
        address = torch.frombuffer(self._whole, dtype=torch.uint8).data_ptr()
        error = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))  # type: ignore[no-untyped-call]
        if error == 0:
            self._registered = address
            return
        _log.warning(
            "%d bytes of host memory cannot be registered with the GPU (CUDA error %d): torch "
            "pins them, and rounds them up to a power of two",
            num_bytes,
            error,
        )
        _let_go_of_refusal()
        pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._whole = memoryview(pinned.numpy().data)

    def close(self) -> None:
        if self._registered is not None:
            torch.cuda.cudart().cudaHostUnregister(self._registered)  # type: ignore[no-untyped-call]
            self._registered = None


def _let_go_of_refusal() -> None:
    """CUDA keeps the error of a call that was refused, and raises it from whatever kernel is launched
    next: let that be one that nobody needs.
    """
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


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
        start = page_floor(offset_bytes)
        end = page_aligned(offset_bytes + num_bytes)
        pieces = [
            self._pool.submit(
                self._read_piece, buffer, position, min(_CHUNK_BYTES, end - position), start
            )
            for position in range(start, end, _CHUNK_BYTES)
        ]
        # All of them, also where one fails: who is told of it may fill the buffer anew.
        concurrent.futures.wait(pieces)
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
