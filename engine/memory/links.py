"""How fast bytes move on this machine: disk, memory, to the GPU and back, measured as they are moved
in a run.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import torch

from engine.memory.stopwatch import Rate, rate_of, rate_of_trials
from engine.memory.tiers import PAGE_BYTES, DirectReader, HostArena, HostBuffer

_PIECE_BYTES: Final = 8 * 2**20
_WRITERS: Final = 4
_CPU: Final = torch.device("cpu")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiskRate:
    """Bytes a second when asked for `request_bytes` at a time."""

    request_bytes: int
    read: Rate
    write: Rate


def disk_rates(
    folder: Path, request_bytes: Sequence[int], *, file_bytes: int, seconds: float
) -> list[DiskRate]:
    """In a nameless file of `folder`, which is gone afterwards; `seconds` for each size and way.

    Reads go as the engine's do, past the page cache and in pieces by several threads; writes in the
    same way. Every size must divide `file_bytes`. Raises OSError.
    """
    assert all(file_bytes % each == 0 for each in request_bytes), "places lie in the file"
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".freight-profile-") as file:
        path = Path(file.name)
        written = [
            _write_rate(path, each, file_bytes=file_bytes, seconds=seconds)
            for each in sorted(request_bytes, reverse=True)  # the largest lays the file out
        ]
        read = [
            _read_rate(path, each, file_bytes=file_bytes, seconds=seconds) for each in request_bytes
        ]
    return [
        DiskRate(request_bytes=size, read=reading, write=writing)
        for size, reading, writing in zip(request_bytes, read, reversed(written), strict=True)
    ]


def _read_rate(path: Path, request_bytes: int, *, file_bytes: int, seconds: float) -> Rate:
    buffer = HostBuffer(request_bytes + 2 * PAGE_BYTES)
    places = _places(request_bytes, file_bytes)
    with DirectReader(path) as reader:

        def read() -> None:
            reader.read(buffer, offset_bytes=next(places), num_bytes=request_bytes)

        return rate_of(read, amount=request_bytes, device=_CPU, seconds=seconds)


Reading = Callable[[], contextlib.AbstractContextManager[None]]
"""Enter what it gives, and one request follows the other until you leave it; as often as you like."""


@contextlib.contextmanager
def disk_reader(folder: Path, *, request_bytes: int, file_bytes: int) -> Iterator[Reading]:
    """Of a nameless file of `folder`, which is gone afterwards. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".freight-profile-") as file:
        path = Path(file.name)
        _write_rate(path, request_bytes, file_bytes=file_bytes, seconds=0.0)
        buffer = HostBuffer(request_bytes + 2 * PAGE_BYTES)
        with DirectReader(path) as reader, concurrent.futures.ThreadPoolExecutor(1) as pool:

            def read(is_over: threading.Event) -> None:
                for place in _places(request_bytes, file_bytes):
                    if is_over.is_set():
                        return
                    reader.read(buffer, offset_bytes=place, num_bytes=request_bytes)

            @contextlib.contextmanager
            def reading() -> Iterator[None]:
                is_over = threading.Event()
                job = pool.submit(read, is_over)
                try:
                    yield
                finally:
                    is_over.set()
                job.result()

            yield reading


def _write_rate(path: Path, request_bytes: int, *, file_bytes: int, seconds: float) -> Rate:
    """Until every place was written once, and then for what is left of `seconds`. What went to the
    page cache is waited for in each trial.
    """
    content = _noise(request_bytes)
    file, is_direct = _open_for_writing(path)
    places = _places(request_bytes, file_bytes)
    trials: list[float] = []
    least = 2 if os.fstat(file).st_size >= file_bytes else file_bytes // request_bytes
    ends_s = time.perf_counter() + seconds
    try:
        with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
            while len(trials) < max(2, least) or time.perf_counter() < ends_s:
                started_s = time.perf_counter()
                place = next(places)
                pieces = [
                    pool.submit(
                        os.pwrite, file, content[first : first + _PIECE_BYTES], place + first
                    )
                    for first in range(0, request_bytes, _PIECE_BYTES)
                ]
                for piece in pieces:
                    piece.result()
                if not is_direct:
                    os.fdatasync(file)
                trials.append(max(time.perf_counter() - started_s, 1e-9))
        os.fsync(file)
    finally:
        os.close(file)
    return rate_of_trials(trials, amount=request_bytes)


def _open_for_writing(path: Path) -> tuple[int, bool]:
    """Whether writes go past the page cache: some file systems have no direct I/O."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT), True
    except OSError:
        return os.open(path, os.O_WRONLY), False


def _noise(num_bytes: int) -> memoryview:
    """Page-aligned bytes that nothing on the way can make smaller."""
    buffer = mmap.mmap(-1, num_bytes)
    noise = os.urandom(min(num_bytes, _PIECE_BYTES))
    for first in range(0, num_bytes, len(noise)):
        buffer[first : first + len(noise)] = noise[: num_bytes - first]
    return memoryview(buffer)


def _places(request_bytes: int, file_bytes: int) -> Iterator[int]:
    """Every multiple of `request_bytes` in the file, over and over."""
    return itertools.cycle(range(0, file_bytes, request_bytes))


def memory_read_rate(device: torch.device, *, num_bytes: int, seconds: float) -> Rate:
    """Bytes a second of one scan."""
    scanned = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return rate_of(scanned.sum, amount=num_bytes, device=device, seconds=seconds)


def copy_rate(
    device: torch.device, *, to_gpu: bool, pinned: bool, num_bytes: int, seconds: float
) -> Rate:
    """Bytes a second between host memory and the GPU `device`."""
    arena = HostArena(num_bytes, pinned=pinned)
    host = arena.take(num_bytes).bytes
    host.fill_(1)  # pages that were never touched are all the same one
    away = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    source, target = (host, away) if to_gpu else (away, host)
    try:
        return rate_of(
            lambda: target.copy_(source, non_blocking=True),
            amount=num_bytes,
            device=device,
            seconds=seconds,
        )
    finally:
        arena.close()
