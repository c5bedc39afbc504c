"""The contract of a file store: named byte blobs, written once, read in ranges, never changed."""

import abc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Self


class FileStore(abc.ABC):
    """Blobs by name. A blob appears whole or not at all; names are ids, never user text."""

    @classmethod
    @abc.abstractmethod
    def open(cls, location: Path) -> Self:
        """Open the store at `location`, making it if need be."""

    @abc.abstractmethod
    def write(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A stream to fill. Leaving the context cleanly publishes the blob, durably and atomically,
        replacing one of that name; leaving it by an exception leaves nothing behind.
        """

    @abc.abstractmethod
    def read(self, name: str) -> AbstractContextManager[BinaryIO]:
        """The blob as a seekable stream. Raises NotFoundError."""

    @abc.abstractmethod
    def size(self, name: str) -> int:
        """Bytes of the blob. Raises NotFoundError."""

    @abc.abstractmethod
    def named_at(self, name: str) -> float:
        """No earlier than when the blob got this name, Unix seconds. Raises NotFoundError."""

    @abc.abstractmethod
    def link(self, name: str, new_name: str) -> None:
        """Give the blob a second name that outlives the first. Raises NotFoundError."""

    @abc.abstractmethod
    def delete(self, name: str) -> bool:
        """Remove the name; whether it was there."""

    @abc.abstractmethod
    def names(self) -> Iterator[str]:
        """All names, in no order."""
