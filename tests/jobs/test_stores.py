"""The contract of a file store, over every store of the table."""

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from jobs.errors import NotFoundError
from jobs.stores import STORES
from jobs.stores.base import FileStore
from jobs.stores.folder import FolderStore


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    return STORES[request.param].open(tmp_path / "files")


def put(store: FileStore, name: str, data: bytes) -> None:
    with store.write(name) as stream:
        stream.write(data)


def get(store: FileStore, name: str) -> bytes:
    with store.read(name) as stream:
        return stream.read()


def test_what_was_written_is_read(store: FileStore) -> None:
    put(store, "a", b"0123456789")
    assert get(store, "a") == b"0123456789"
    assert store.size("a") == 10
    with store.read("a") as stream:
        stream.seek(4)
        assert stream.read(2) == b"45"


def test_a_blob_is_not_there_before_it_is_whole(store: FileStore) -> None:
    with store.write("a") as stream:
        stream.write(b"x" * 100_000)
        assert list(store.names()) == []
        with pytest.raises(NotFoundError):
            store.size("a")
    assert list(store.names()) == ["a"]


def test_a_failed_write_leaves_what_was_there(store: FileStore, tmp_path: Path) -> None:
    put(store, "a", b"old")
    with contextlib.suppress(KeyboardInterrupt), store.write("a") as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert get(store, "a") == b"old"
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["a"]


def test_a_second_write_replaces_the_first(store: FileStore) -> None:
    put(store, "a", b"old")
    with store.read("a") as reader:
        put(store, "a", b"new")
        assert reader.read() == b"old"
    assert get(store, "a") == b"new"


def test_a_link_survives_the_deletion_of_its_source(store: FileStore) -> None:
    put(store, "a", b"x")
    store.link("a", "b")
    assert store.delete("a") is True
    assert store.delete("a") is False
    assert get(store, "b") == b"x"


def test_a_link_to_an_old_blob_is_young(store: FileStore, tmp_path: Path) -> None:
    started_s = time.time() - 1
    put(store, "a", b"x")
    os.utime(tmp_path / "files" / "a", (1, 1))
    store.link("a", "b")
    assert started_s <= store.named_at("b") <= time.time()
    with pytest.raises(NotFoundError):
        store.named_at("c")


def test_a_reader_survives_deletion(store: FileStore) -> None:
    put(store, "a", b"x")
    with store.read("a") as stream:
        store.delete("a")
        assert stream.read() == b"x"


@pytest.mark.parametrize(
    "name", ["../escape", "..", ".", "", "a/b", "/etc/passwd", "a\x00b", ".hidden", "x" * 129, "é"]
)
def test_hostile_names_meet_no_file(store: FileStore, tmp_path: Path, name: str) -> None:
    put(store, "good", b"x")
    for attempt in (store.size, store.delete, lambda name: store.link("good", name)):
        with pytest.raises(NotFoundError):
            attempt(name)
    with pytest.raises(NotFoundError):
        put(store, name, b"x")
    with pytest.raises(NotFoundError):
        get(store, name)
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_what_is_not_there_cannot_be_linked(store: FileStore) -> None:
    with pytest.raises(NotFoundError, match="No such File object: a"):
        store.link("a", "b")


def test_writers_of_one_name_do_not_mix(store: FileStore) -> None:
    def write(byte: bytes) -> None:
        put(store, "a", byte * 300_000)

    threads = [threading.Thread(target=write, args=(byte,)) for byte in (b"x", b"y")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get(store, "a") in (b"x" * 300_000, b"y" * 300_000)


def test_opening_a_folder_sweeps_what_a_killed_writer_left(tmp_path: Path) -> None:
    for name, age_s in ((".a.1.part", 90_000), (".b.2.part", 60)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    FolderStore.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".b.2.part"]
