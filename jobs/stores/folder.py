"""A file store in a local folder: hidden temporary file, fsync, rename; hard links for snapshots."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from jobs.errors import NotFoundError
from jobs.stores.base import FileStore

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_ABANDONED_AFTER_S = 86_400


class FolderStore(FileStore):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def open(cls, location: Path) -> Self:
        location.mkdir(parents=True, exist_ok=True)
        store = cls(location)
        store._sweep()
        return store

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        target = self._path(name)
        temporary = self._folder / f".{name}.{secrets.token_hex(4)}.part"
        try:
            with temporary.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        self._sync_folder()

    @contextlib.contextmanager
    def read(self, name: str) -> Iterator[BinaryIO]:
        try:
            stream = self._path(name).open("rb")
        except FileNotFoundError:
            raise _missing(name) from None
        with stream:
            yield stream

    def size(self, name: str) -> int:
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            raise _missing(name) from None

    def named_at(self, name: str) -> float:
        try:
            # Of the inode, not of its bytes: a link to an old blob is young.
            return self._path(name).stat().st_ctime
        except FileNotFoundError:
            raise _missing(name) from None

    def link(self, name: str, new_name: str) -> None:
        try:
            self._path(new_name).hardlink_to(self._path(name))
        except FileNotFoundError:
            raise _missing(name) from None
        self._sync_folder()

    def delete(self, name: str) -> bool:
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def names(self) -> Iterator[str]:
        return (path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def _sweep(self) -> None:
        """Remove what a killed writer left. Young ones may belong to a living writer."""
        oldest_s = time.time() - _ABANDONED_AFTER_S
        for path in self._folder.glob(".*.part"):
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                if path.stat().st_mtime < oldest_s:
                    path.unlink()

    def _path(self, name: str) -> Path:
        # Names come from URLs too: anything but an id must never meet the file system.
        if _NAME.fullmatch(name) is None:
            raise _missing(name)
        return self._folder / name

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _missing(name: str) -> NotFoundError:
    return NotFoundError(f"No such File object: {name}", param="id")
