"""Room for values on disk: a nameless file in the spill folder, mapped; knows nothing of its values."""

import mmap
import os
import tempfile
from pathlib import Path

import torch

from engine.errors import BudgetError


class SpillFile:
    """`num_bytes` of the spill folder as one uint8 tensor. Nothing of it outlives the process.

    The space is taken at once: a mapped write to a full disk would kill the process. It is given
    back with the last tensor of it. Raises BudgetError where the folder has not that much room.
    """

    def __init__(self, folder: Path, num_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                raise BudgetError(
                    f"{folder} has no room for {num_bytes:,} bytes of keys and values: "
                    f"{error.strerror}"
                ) from error
            self._map = mmap.mmap(file.fileno(), num_bytes)
        self._map.madvise(mmap.MADV_RANDOM)
        self.bytes = torch.frombuffer(memoryview(self._map), dtype=torch.uint8)

    def will_need(self, offset_bytes: int, num_bytes: int) -> None:
        """Have the kernel read the range ahead; returns at once."""
        start = offset_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, start, offset_bytes + num_bytes - start)
