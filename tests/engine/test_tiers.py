import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.memory import tiers
from engine.memory.tiers import PAGE_BYTES, DirectReader, HostArena, HostBuffer

FILE_BYTES = 3 * 2**20 + 1234
CONTENT = torch.randint(0, 256, (FILE_BYTES,), generator=torch.Generator().manual_seed(1)).to(
    torch.uint8
)
RANGES = st.tuples(st.integers(0, FILE_BYTES - 1), st.integers(0, 2**21)).map(
    lambda pair: (pair[0], min(pair[1], FILE_BYTES - pair[0]))
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiers") / "weights.bin"
    path.write_bytes(CONTENT.numpy().tobytes())
    return path


@pytest.fixture(scope="module", params=["direct", "plain"])
def reader(path: Path, request: pytest.FixtureRequest) -> Iterator[DirectReader]:
    """Small pieces, so that a range of this small file is read by several threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.memory.tiers._CHUNK_BYTES", 16 * PAGE_BYTES)
        if request.param == "plain":
            refuse_direct_files(patch)
        with DirectReader(path) as reader:
            yield reader


def refuse_direct_files(patch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *rest)

    patch.setattr(os, "open", refuse)


@given(span=RANGES)
def test_any_range_comes_back_as_it_lies_in_the_file(
    reader: DirectReader, span: tuple[int, int]
) -> None:
    offset_bytes, num_bytes = span
    buffer = HostBuffer(num_bytes + 2 * PAGE_BYTES)
    found = reader.read(buffer, offset_bytes=offset_bytes, num_bytes=num_bytes)
    assert torch.equal(found, CONTENT[offset_bytes : offset_bytes + num_bytes])


@pytest.mark.parametrize("num_bytes", [1, 1234, 5000])
def test_the_end_of_the_file_is_read_though_no_page_ends_there(
    reader: DirectReader, num_bytes: int
) -> None:
    buffer = HostBuffer(num_bytes + 2 * PAGE_BYTES)
    found = reader.read(buffer, offset_bytes=FILE_BYTES - num_bytes, num_bytes=num_bytes)
    assert torch.equal(found, CONTENT[-num_bytes:])


@pytest.mark.parametrize(
    ("offset_bytes", "num_bytes"),
    [(FILE_BYTES - 10, 11), (FILE_BYTES, 1), (0, FILE_BYTES + 9000)],
)
def test_a_range_beyond_the_end_is_an_error_with_the_numbers(
    reader: DirectReader, path: Path, offset_bytes: int, num_bytes: int
) -> None:
    start = offset_bytes // PAGE_BYTES * PAGE_BYTES
    wanted = offset_bytes - start + num_bytes
    message = f"{path} ended early: {wanted} bytes wanted from {start}, got {FILE_BYTES - start}"
    buffer = HostBuffer(num_bytes + 2 * PAGE_BYTES)
    with pytest.raises(OSError, match=message):
        reader.read(buffer, offset_bytes=offset_bytes, num_bytes=num_bytes)


def test_a_file_cut_short_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(bytes(10 * PAGE_BYTES))
    buffer = HostBuffer(12 * PAGE_BYTES)
    with DirectReader(path) as reader:
        assert reader.read(buffer, offset_bytes=0, num_bytes=10 * PAGE_BYTES).sum() == 0
        os.truncate(path, 4 * PAGE_BYTES + 7)
        message = f"40960 bytes wanted from 0, got {4 * PAGE_BYTES + 7}"
        with pytest.raises(OSError, match=message):
            reader.read(buffer, offset_bytes=0, num_bytes=10 * PAGE_BYTES)


def test_bytes_wanted_are_counted_and_not_the_pages_around_them(path: Path) -> None:
    with DirectReader(path) as reader:
        buffer = HostBuffer(3 * PAGE_BYTES)
        reader.read(buffer, offset_bytes=4000, num_bytes=200)
        assert reader.counters.num_bytes == 200
        assert reader.counters.num_reads == 1


def test_the_page_cache_lets_go_of_what_was_read_without_direct_files(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct_files(monkeypatch)
    released: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, *advice: released.append(advice))
    with DirectReader(path) as reader:
        reader.read(HostBuffer(4 * PAGE_BYTES), offset_bytes=5000, num_bytes=8000)
    assert released == [(PAGE_BYTES, 3 * PAGE_BYTES, os.POSIX_FADV_DONTNEED)]


def open_files() -> set[str]:
    """By number and file; the listing's own is gone when it is looked at."""
    links = [f"/proc/self/fd/{link.name}" for link in Path("/proc/self/fd").iterdir()]
    return {f"{link} {Path(link).resolve()}" for link in links if Path(link).exists()}


def test_a_closed_reader_leaves_no_file_open_and_may_be_closed_again(path: Path) -> None:
    before = open_files()
    reader = DirectReader(path)
    assert open_files() > before
    reader.close()
    assert open_files() == before
    taken = os.open(path, os.O_RDONLY)  # a closed number is soon another file's
    reader.close()
    os.fstat(taken)
    os.close(taken)


def test_a_read_that_fails_has_left_its_buffer_alone_when_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\1" * (2 * tiers._CHUNK_BYTES))
    real_preadv = os.preadv
    failed, ended = threading.Event(), threading.Event()

    def preadv(file: int, buffers: Any, offset_bytes: int) -> int:
        if offset_bytes == 0:
            failed.set()
            raise OSError("the first piece cannot be read")
        failed.wait()
        time.sleep(0.1)  # the error could be told meanwhile
        got = real_preadv(file, buffers, offset_bytes)
        ended.set()
        return got

    with DirectReader(path) as reader:
        monkeypatch.setattr(os, "preadv", preadv)
        buffer = HostBuffer(2 * tiers._CHUNK_BYTES + 2 * PAGE_BYTES)
        with pytest.raises(OSError, match="the first piece"):
            reader.read(buffer, offset_bytes=0, num_bytes=2 * tiers._CHUNK_BYTES)
        assert ended.is_set()


@pytest.mark.parametrize("num_bytes", [1, PAGE_BYTES, 3 * PAGE_BYTES + 5])
def test_a_host_buffer_starts_on_a_page_and_its_two_faces_are_the_same_bytes(
    num_bytes: int,
) -> None:
    buffer = HostBuffer(num_bytes)
    assert buffer.bytes.data_ptr() % PAGE_BYTES == 0
    assert buffer.bytes.shape == (num_bytes,)
    buffer.view[num_bytes - 1] = 77
    assert buffer.bytes[-1] == 77


def test_buffers_of_an_arena_stand_side_by_side_on_page_borders() -> None:
    arena = HostArena(5 * PAGE_BYTES, pinned=False)
    buffers = [arena.take(num_bytes) for num_bytes in (PAGE_BYTES + 1, 10, 2 * PAGE_BYTES)]
    for index, buffer in enumerate(buffers):
        buffer.bytes.fill_(index + 1)
    places = [buffer.bytes.data_ptr() for buffer in buffers]
    assert [place - places[0] for place in places] == [0, 2 * PAGE_BYTES, 3 * PAGE_BYTES]
    assert places[0] % PAGE_BYTES == 0
    for index, buffer in enumerate(buffers):
        assert set(buffer.bytes.tolist()) == {index + 1}
    with pytest.raises(AssertionError, match="as large as all its buffers"):
        arena.take(1)
    arena.close()


class FakeDriver:
    """What the GPU's driver is asked; `error` is its answer."""

    def __init__(self, error: int) -> None:
        self.registered: dict[int, int] = {}
        self._error = error

    def cudaHostRegister(self, address: int, num_bytes: int, _flags: int) -> int:  # noqa: N802
        if not self._error:
            self.registered[address] = num_bytes
        return self._error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


def test_a_pinned_arena_is_registered_whole_and_given_back_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = FakeDriver(error=0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    arena = HostArena(3 * PAGE_BYTES + 7, pinned=True)
    assert driver.registered == {arena.take(10).bytes.data_ptr(): 3 * PAGE_BYTES + 7}
    arena.close()
    arena.close()
    assert driver.registered == {}


def test_where_the_driver_refuses_torch_pins_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_empty = torch.empty
    asked: list[Any] = []

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append((shape, pin_memory))
        return real_empty(*shape, **options)

    launched: list[str] = []

    def ones(*_: int, device: str) -> torch.Tensor:
        launched.append(device)
        raise RuntimeError("CUDA error: what was refused before, told to whoever comes next")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeDriver(error=801))
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "ones", ones)
    arena = HostArena(2 * PAGE_BYTES, pinned=True)
    assert launched == ["cuda"]
    assert asked == [((2 * PAGE_BYTES,), True)]
    assert "8192 bytes" in caplog.text
    assert "CUDA error 801" in caplog.text
    arena.take(PAGE_BYTES).bytes.fill_(1)
    arena.close()
