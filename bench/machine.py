"""The profile of the machine at hand that benchmarks plan by: measured once, in a process of its own."""

import functools
import os
import subprocess
import sys
from pathlib import Path

from bench.peers import ROOT


@functools.cache
def machine_profile(cache: Path) -> Path:
    """Of `cache`, where it is measured if it is not there. Raises CalledProcessError."""
    path = cache / "machine.json"
    if not path.exists():
        command = [sys.executable, "-m", "cli.main", "profile", "--out", str(path)]
        environment = {**os.environ, "FREIGHT_STATE_DIR": str(cache / "state")}
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
    return path
