"""What this process has taken of each tier at most, as the system counts it."""

import contextlib
from pathlib import Path
from typing import Final

import torch

from engine.planning.policy import Tier

_STATUS: Final = Path("/proc/self/status")
_BLOCK_BYTES: Final = 512  # of `st_blocks`, whatever the file system's own


def peak_bytes(spill_dir: Path) -> dict[Tier, int]:
    """Resident memory and torch's GPU memory since the process began; on disk, what lies there."""
    gpu_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        Tier.GPU: gpu_bytes,
        Tier.CPU: peak_host_bytes(),
        Tier.DISK: folder_bytes(spill_dir),
    }


def peak_host_bytes(status: Path = _STATUS) -> int:
    """The high-water mark of resident memory."""
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def folder_bytes(folder: Path) -> int:
    """Bytes that the files below `folder` take on the disk; holes take none."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a pack's writer may just have renamed it
            total += path.lstat().st_blocks * _BLOCK_BYTES
    return total
