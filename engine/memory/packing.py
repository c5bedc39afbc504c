"""Writing a pack's file so that a killed writer's work is not lost: part by part, with a journal.

A part's checksums enter the journal once its bytes are on the disk. Who goes on later believes the
journal only as far as the bytes it names are really there. Knows no locks and no budgets.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import torch

from engine.errors import CheckpointError
from engine.memory.checksums import CHUNK_BYTES, checksum, chunk_checksums
from engine.memory.conversion import Conversion, Part
from engine.memory.manifest import (
    DATA_FILE,
    PackGroup,
    groups_as_json,
    write_manifest,
)
from engine.memory.source import bytes_of, read_bytes

JOURNAL_FILE: Final = "journal.jsonl"
SYNC_BYTES: Final = 64 * 2**20  # written between two syncs: at most this is written twice

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all
Checksums = dict[str, tuple[int, ...]]  # by tensor
Claim = tuple[Checksums, int]  # and where its line of the journal ends


def write_pack(
    conversion: Conversion,
    groups: tuple[PackGroup, ...],
    folder: Path,
    progress: Progress | None,
) -> tuple[PackGroup, ...]:
    """Write those of the groups that lie in `folder`'s own file, then let the folder appear by a
    rename; the groups with their checksums. What an earlier writer left is gone on from.

    Raises CheckpointError for a source that cannot be converted, OSError.
    """
    partial = partial_folder(folder)
    partial.mkdir(exist_ok=True)
    own = [group for group in groups if group.path == folder / DATA_FILE]
    try:
        if own:
            with _PackFile(partial, groups, own) as file:
                for group in own:
                    file.write_group(conversion, group, progress)
                groups = tuple(file.with_checksums(group) for group in groups)
    except CheckpointError:
        shutil.rmtree(partial)  # nobody can go on from it
        raise
    write_manifest(groups, partial)
    for path in (*partial.iterdir(), partial):
        _sync(path)
    partial.rename(folder)
    _sync(folder.parent)
    (folder / JOURNAL_FILE).unlink(missing_ok=True)
    return groups


def partial_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def resumable_bytes(folder: Path, groups: tuple[PackGroup, ...]) -> int:
    """Bytes of tensors that an earlier writer claims to have left; they are checked when used."""
    claims = _read_journal(partial_folder(folder) / JOURNAL_FILE, groups)
    claimed = {name for claim, _ in claims for name in claim}
    return sum(t.num_bytes for group in groups for t in group.tensors if t.name in claimed)


class _PackFile:
    """The data file under way, and its journal. Opening it checks and keeps what is there."""

    def __init__(
        self, partial: Path, groups: tuple[PackGroup, ...], own: Iterable[PackGroup]
    ) -> None:
        self._path = partial / DATA_FILE
        self._places = {t.name: (group, t) for group in own for t in group.tensors}
        self._total_bytes = sum(group.num_bytes for group in own)
        self._written: Checksums = {}
        self._unsynced: list[Checksums] = []
        self._unsynced_bytes = 0
        self._path.touch()
        (partial / JOURNAL_FILE).touch()
        journal_bytes = 0
        for claim, end_bytes in self._believed(_read_journal(partial / JOURNAL_FILE, groups)):
            self._written |= claim
            journal_bytes = end_bytes
        self._data: BinaryIO = self._path.open("r+b", buffering=0)
        self._data.truncate(max((self._end(name) for name in self._written), default=0))
        self._journal: BinaryIO = (partial / JOURNAL_FILE).open("r+b", buffering=0)
        self._journal.truncate(journal_bytes)
        self._journal.seek(journal_bytes)
        if not journal_bytes:
            self._journal.write(_header(groups))
        for folder in (partial, partial.parent):  # so that the two files are found after a crash
            _sync(folder)

    def write_group(
        self, conversion: Conversion, group: PackGroup, progress: Progress | None
    ) -> None:
        for part in conversion.parts_of(group.name):
            if not self._written.keys() >= set(part.names):
                self._write_part(conversion, part)
        self._checkpoint()
        if progress is not None:
            progress(group.offset_bytes + group.num_bytes, self._total_bytes)

    def with_checksums(self, group: PackGroup) -> PackGroup:
        tensors = tuple(
            dataclasses.replace(tensor, checksums=self._written.get(tensor.name, ()))
            for tensor in group.tensors
        )
        return dataclasses.replace(group, tensors=tensors)

    def _write_part(self, conversion: Conversion, part: Part) -> None:
        values = conversion.read(part)
        found: Checksums = {}
        for name in part.names:
            group, tensor = self._places[name]
            value = values.pop(name)
            assert value.dtype == tensor.dtype, name
            assert tuple(value.shape) == tensor.shape, name
            raw = bytes_of(value.contiguous())
            self._write_at(group.offset_bytes + tensor.offset_bytes, raw)
            found[name] = chunk_checksums(raw)
            self._unsynced_bytes += tensor.num_bytes
        self._unsynced.append(found)
        self._written |= found
        if self._unsynced_bytes >= SYNC_BYTES:
            self._checkpoint()

    def _write_at(self, offset_bytes: int, raw: torch.Tensor) -> None:
        rest = memoryview(raw.numpy().data)
        while rest:
            count = os.pwrite(self._data.fileno(), rest[:SYNC_BYTES], offset_bytes)
            rest, offset_bytes = rest[count:], offset_bytes + count

    def _checkpoint(self) -> None:
        """First the bytes, then the journal's word for them."""
        if not self._unsynced:
            return
        _flush(self._data)
        self._journal.writelines(_line(claim) for claim in self._unsynced)
        _flush(self._journal)
        self._unsynced.clear()
        self._unsynced_bytes = 0

    def _believed(self, claims: Iterable[Claim]) -> Iterator[Claim]:
        """The claims that the bytes bear out, up to the first that they do not."""
        for claim, end_bytes in claims:
            if not all(self._holds(name, expected) for name, expected in claim.items()):
                return
            yield claim, end_bytes

    def _holds(self, name: str, expected: tuple[int, ...]) -> bool:
        group, tensor = self._places[name]
        if self._end(name) > self._path.stat().st_size:
            return False
        start = group.offset_bytes + tensor.offset_bytes
        return all(
            checksum(read_bytes(self._path, start + at, min(CHUNK_BYTES, tensor.num_bytes - at)))
            == value
            for at, value in zip(range(0, tensor.num_bytes, CHUNK_BYTES), expected, strict=True)
        )

    def _end(self, name: str) -> int:
        group, tensor = self._places[name]
        return group.offset_bytes + tensor.offset_bytes + tensor.num_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """On the way out of an error too, what is written is vouched for."""
        try:
            if not isinstance(error, OSError):
                self._checkpoint()
            if error is None:
                self._data.truncate(self._total_bytes)
                _flush(self._data)
        finally:
            self._data.close()
            self._journal.close()


def _read_journal(path: Path, groups: tuple[PackGroup, ...]) -> Iterator[Claim]:
    """What was vouched for under the same plan, up to a line that was cut off or damaged."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if not lines or lines[0] != _header(groups):
        return
    end_bytes = len(lines[0])
    for line in lines[1:]:
        entry = _entry(line)
        if entry is None:
            return
        end_bytes += len(line)
        yield {name: tuple(values) for name, values in entry.items()}, end_bytes


def _header(groups: tuple[PackGroup, ...]) -> bytes:
    """The journal's first line: a plan that differs in anything makes another one."""
    plan = json.dumps(groups_as_json(groups)).encode()
    return _line({"plan": hashlib.sha256(plan).hexdigest()})


def _line(fields: Mapping[str, Any]) -> bytes:
    text = json.dumps(fields, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _entry(line: bytes) -> dict[str, Any] | None:
    """What `_line` was made of; None for anything else."""
    text = line[9:-1]
    if line != b"%08x %s\n" % (zlib.crc32(text), text):
        return None
    fields: dict[str, Any] = json.loads(text)
    return fields


def _flush(file: BinaryIO) -> None:
    """To the disk, then out of the page cache: its pages would count against the memory limit."""
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
