"""Copies beside a CPU that computes. Knows no tiers."""

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch

_PLAIN: Final[Mapping[int, torch.dtype]] = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}


def copy_by_one_thread(target: torch.Tensor, source: torch.Tensor) -> None:
    """`source` into `target`, of the same shape and dtype, both in host memory.

    torch divides a copy of more than 32,768 values among threads of the asking thread's own; where other
    threads compute there are then more that want cores than there are cores, and both wait for each other:
    products beside such copies had half of their rate, and have nine tenths beside these.
    """
    assert target.dtype == source.dtype, "values are not converted"
    plain = _PLAIN[target.itemsize]
    np.copyto(target.view(plain).numpy(), source.view(plain).numpy())
