"""Memory that was freed stays for whoever asks next, until it is given back."""

import subprocess
import sys

import pytest

_PROGRAM = """
import torch
from engine.memory.allocator import give_freed_memory_back, keep_freed_memory

def resident_bytes():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

keep_freed_memory()
held = [torch.ones(2**22, dtype=torch.uint8) for _ in range(32)]
del held
kept = resident_bytes()
give_freed_memory_back()
print(kept - resident_bytes())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_large_temporaries_stay_until_they_are_given_back() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(ran.stdout) > 30 * 2**22
