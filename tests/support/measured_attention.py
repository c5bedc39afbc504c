"""Attention of rows that decode, in a process of its own, that says what it took beside its inputs.

`python -m tests.support.measured_attention DTYPE HEADS KV_HEADS SIZE ROWS TOKENS` prints bytes: of
what was resident more than before, at the peak.
"""

import sys
from pathlib import Path

import torch

from engine.compute.attend import attend, plan_attention
from engine.compute.segments import Head, Segment
from tests.support.measured_run import memory_bytes


def decode(dtype: torch.dtype, sizes: tuple[int, int, int], rows: int, tokens: int) -> int:
    """Peak bytes of one layer's attention of `rows` that see `tokens` each."""
    heads, kv_heads, size = sizes
    segments = [
        Segment(start=row, num_tokens=1, past=tokens - 1, slot=row * tokens) for row in range(rows)
    ]
    query = torch.ones(heads, rows, size, dtype=dtype)
    keys = torch.ones(kv_heads, rows * tokens, size, dtype=dtype)
    values = torch.ones(kv_heads, rows * tokens, size, dtype=dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before_bytes = memory_bytes("VmRSS")
    plan = plan_attention(segments, window=None, dtype=dtype)
    for _ in range(2):
        attend(query, keys, values, plan=plan, head=Head(scaling=size**-0.5))
    return memory_bytes("VmHWM") - before_bytes


def main() -> None:
    dtype = getattr(torch, sys.argv[1])
    heads, kv_heads, size, rows, tokens = map(int, sys.argv[2:])
    torch.set_num_threads(1)
    with torch.inference_mode():
        decode(dtype, (heads, kv_heads, size), 2, 8)  # wakes the libraries
        sys.stdout.write(str(decode(dtype, (heads, kv_heads, size), rows, tokens)))


if __name__ == "__main__":
    main()
