"""A memory cgroup with a hard limit and no swap, of either version of the interface.

The limit counts page cache too, so an engine that maps its weights gets the same memory as one that
reads them past the cache. Knows nothing of engines.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

_V1: Final = Path("/sys/fs/cgroup/memory")
_V2: Final = Path("/sys/fs/cgroup")
_CLOSE_TRIES: Final = 50


class NoMemoryGroupError(Exception):
    """No memory cgroup can be made here."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One cgroup. A process joins it before it starts to be counted."""

    folder: Path
    is_v1: bool

    @classmethod
    def make(cls, name: str, *, limit_bytes: int) -> Self:
        """Raises NoMemoryGroupError with what was tried."""
        is_v1 = (_V1 / "memory.limit_in_bytes").exists()
        group = cls(folder=(_V1 if is_v1 else _V2) / name, is_v1=is_v1)
        try:
            group._open(limit_bytes)
        except OSError as error:
            raise NoMemoryGroupError(
                f"no memory cgroup of {limit_bytes:,} bytes can be made at {group.folder}: {error}. "
                "This benchmark compares engines under one hard limit; run it as root, where the "
                "memory controller is writable."
            ) from error
        return group

    def _open(self, limit_bytes: int) -> None:
        if self.is_v1:
            self.folder.mkdir(exist_ok=True)
            self._write("memory.swappiness", 0)
            self._write("memory.limit_in_bytes", limit_bytes)
            if (self.folder / "memory.memsw.limit_in_bytes").exists():
                self._write("memory.memsw.limit_in_bytes", limit_bytes)
            return
        controllers = (_V2 / "cgroup.controllers").read_text().split()
        if "memory" not in controllers:
            raise OSError(f"{_V2 / 'cgroup.controllers'} has no memory controller: {controllers}")
        (_V2 / "cgroup.subtree_control").write_text("+memory")
        self.folder.mkdir(exist_ok=True)
        self._write("memory.max", limit_bytes)
        if (self.folder / "memory.swap.max").exists():
            self._write("memory.swap.max", 0)

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))

    @property
    def processes(self) -> Path:
        """The file to write a process id into."""
        return self.folder / "cgroup.procs"

    @property
    def peak_bytes(self) -> int | None:
        """Of memory and page cache together; None where the kernel does not say."""
        path = self.folder / ("memory.max_usage_in_bytes" if self.is_v1 else "memory.peak")
        return int(path.read_text()) if path.exists() else None

    @property
    def num_killed(self) -> int:
        """Processes that were killed because the limit was reached."""
        path = self.folder / ("memory.oom_control" if self.is_v1 else "memory.events")
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields.get("oom_kill", 0))

    def close(self) -> None:
        """Give its page cache back and remove it; its processes must have ended."""
        if self.is_v1:
            with contextlib.suppress(OSError):
                self._write("memory.force_empty", 0)
        for _ in range(_CLOSE_TRIES):
            try:
                self.folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)  # the kernel is still taking the last process down
            else:
                return


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A fresh group, so that its peak and its page cache are one leg's own."""
    group = MemoryGroup.make(f"freight-bench-{os.getpid()}", limit_bytes=limit_bytes)
    try:
        yield group
    finally:
        group.close()
