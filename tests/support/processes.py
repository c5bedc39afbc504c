"""Waiting for what other processes do, with a bound and without luck."""

import time
from collections.abc import Callable
from pathlib import Path


def wait_until(holds: Callable[[], bool], *, limit_s: float = 20.0) -> None:
    end_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


def is_running(process_id: int) -> bool:
    """False for a zombie: it only waits to be collected."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
