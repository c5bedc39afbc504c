"""Which packs a spill folder keeps: what they take, which are in use, which go when room is needed.

A reader holds its pack's folder under a shared lock; a writer holds `<identity>.lock`. A pack that
goes is renamed first, so that it is there whole or not at all.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from engine.errors import PackError

_REMOVING: Final = ".removing"
_PARTIAL: Final = ".partial"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeptPack:
    """A pack's folder, whole or partial. `num_bytes` is what it takes on disk."""

    path: Path
    num_bytes: int
    used_at_ns: int

    @property
    def identity(self) -> str:
        return self.path.name.removesuffix(_REMOVING).removesuffix(_PARTIAL)


def packs_folder(spill_dir: Path) -> Path:
    return spill_dir / "packs"


def kept_packs(spill_dir: Path) -> list[KeptPack]:
    """Every pack and every part of one, longest unused first."""
    folder = packs_folder(spill_dir)
    found = [_kept(path) for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda pack: pack.used_at_ns)


def prune_packs(spill_dir: Path, keep: Collection[str], *, need_bytes: int | None = None) -> int:
    """Remove packs whose identity is not in `keep`, longest unused first; the bytes set free.

    Stops once `need_bytes` are free; None means all. One that is read or written stays.
    """
    freed_bytes = 0
    for pack in removable_packs(spill_dir, keep):
        if need_bytes is not None and freed_bytes >= need_bytes:
            break
        with _claimed(pack) as claimed:
            if claimed:
                _remove(pack.path)
                freed_bytes += pack.num_bytes
    return freed_bytes


def removable_packs(spill_dir: Path, keep: Collection[str]) -> list[KeptPack]:
    """What `prune_packs` would remove, in its order."""
    removable = []
    for pack in kept_packs(spill_dir):
        if pack.identity not in keep:
            with _claimed(pack) as claimed:
                removable += [pack] if claimed else []
    return removable


class PackHold:
    """Keeps a pack from being pruned while it is read, also by other processes. Close it."""

    def __init__(self, folder: Path) -> None:
        """Raises PackError if the pack has gone in the meantime."""
        try:
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise PackError(f"{folder} is gone: {error}") from error
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        if not folder.is_dir() or not os.path.samestat(os.fstat(self._descriptor), folder.stat()):
            self.close()
            raise PackError(f"{folder} was removed while it was opened")
        os.utime(self._descriptor)  # the order of removal goes by last use

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """One process at a time writes the pack that `folder` is or will be; others wait."""
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _claimed(pack: KeptPack) -> Iterator[bool]:
    """Whether nobody reads or writes the pack, and nobody will as long as this lasts."""
    with contextlib.ExitStack() as locks:
        lock_path = pack.path.with_name(f"{pack.identity}.lock")
        try:
            for path, flags in ((lock_path, os.O_RDWR | os.O_CREAT), (pack.path, os.O_RDONLY)):
                descriptor = os.open(path, flags, 0o644)
                locks.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):
            yield False
            return
        yield True


def _remove(path: Path) -> None:
    leaving = path
    if path.suffix != _REMOVING:
        leaving = path.with_name(f"{path.name}{_REMOVING}")
        shutil.rmtree(leaving, ignore_errors=True)
        path.rename(leaving)
    shutil.rmtree(leaving)


def _kept(path: Path) -> KeptPack:
    """A file that vanishes while it is looked at takes nothing."""
    num_bytes = used_at_ns = 0
    with contextlib.suppress(FileNotFoundError):
        used_at_ns = path.stat().st_mtime_ns
        for file in path.iterdir():
            num_bytes += file.stat().st_blocks * 512
    return KeptPack(path=path, num_bytes=num_bytes, used_at_ns=used_at_ns)
