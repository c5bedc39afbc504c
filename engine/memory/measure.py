"""What this machine really has: memory of the container, not of the host, and the GPU's."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from engine.config import Budgets
from engine.errors import BudgetError
from engine.memory.cgroups import memory_limits
from engine.memory.retention import kept_packs

_HOST_SHARE: Final = 0.8
_GPU_SHARE: Final = 0.9


def measure_budgets(
    *,
    spill_dir: Path,
    gpu_bytes: int | None = None,
    host_bytes: int | None = None,
    disk_bytes: int | None = None,
) -> Budgets:
    """The given limits, and for each not given a share of what is free. No GPU means 0 bytes of it.

    Raises BudgetError for GPU bytes without a GPU.
    """
    if gpu_bytes and not torch.cuda.is_available():
        raise BudgetError(f"{gpu_bytes:,} bytes of GPU memory are asked for and no GPU is usable")
    spill_dir.mkdir(parents=True, exist_ok=True)
    return Budgets(
        gpu_bytes=_free_gpu_bytes() if gpu_bytes is None else gpu_bytes,
        host_bytes=int(_HOST_SHARE * free_host_bytes()) if host_bytes is None else host_bytes,
        disk_bytes=_disk_bytes(spill_dir) if disk_bytes is None else disk_bytes,
        spill_dir=spill_dir,
    )


def _free_gpu_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    free, _total = torch.cuda.mem_get_info()
    return int(_GPU_SHARE * free)


def free_host_bytes(
    limits: Sequence[Path] | None = None, meminfo: Path = Path("/proc/meminfo")
) -> int:
    """The smaller of what the kernel calls available and what the container may still take.

    `limits` are files of control groups; None: those of this process's own and all around it.
    """
    limits = memory_limits() if limits is None else limits
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit in limits:
        text = limit.read_text().strip() if limit.is_file() else "max"
        if text.isdecimal():
            available = min(available, int(text) - _used_bytes(limit))
    return max(0, available)


def _used_bytes(limit: Path) -> int:
    usage = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
    path = limit.with_name(usage[limit.name])
    used = int(path.read_text()) if path.is_file() else 0
    # Page cache counts as used and gives way when asked.
    stat = limit.with_name("memory.stat")
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    # The first generation tells a nested group's own and, as total, what its limit is about.
    cached = int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
    return max(0, used - cached)


def _disk_bytes(spill_dir: Path) -> int:
    """What is free, and what packs take already: they are used again, or make room."""
    kept_bytes = sum(pack.num_bytes for pack in kept_packs(spill_dir))
    return shutil.disk_usage(spill_dir).free + kept_bytes
