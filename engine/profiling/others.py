"""How much of the cores other processes take while something is measured: of figures that are taken
then nobody knows what this machine can do.
"""

import os
import time
from pathlib import Path
from typing import Final

_PROC_STAT: Final = Path("/proc/stat")
_BUSY_FIELDS: Final = (1, 2, 3, 6, 7, 8)
"""User, nice, system, interrupts of both kinds, and what the hypervisor gave to others."""


class OthersWatch:
    """Watches the cores that this process may run on, from when it is made."""

    def __init__(self, stat: Path = _PROC_STAT) -> None:
        self._stat = stat
        self._cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        self._began_s = time.perf_counter()
        self._busy_s = self._read_busy_s()
        self._own_s = time.process_time()

    def share(self) -> float:
        """Of the cores' time since then, what others had; 0 where the kernel does not tell."""
        took_s = (time.perf_counter() - self._began_s) * len(self._cores)
        busy_s = self._read_busy_s() - self._busy_s
        others_s = busy_s - (time.process_time() - self._own_s)
        return min(1.0, max(0.0, others_s / took_s)) if took_s else 0.0

    def _read_busy_s(self) -> float:
        lines = self._stat.read_text().splitlines() if self._stat.is_file() else []
        rows = [line.split() for line in lines]
        ticks = sum(
            int(row[field])
            for row in rows
            if row and row[0] in self._cores
            for field in _BUSY_FIELDS
            if field < len(row)
        )
        return ticks / os.sysconf("SC_CLK_TCK")
