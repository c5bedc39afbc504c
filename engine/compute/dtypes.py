"""What a model may be computed in: what was asked for, or what suits the device. Knows no kernels."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from engine.errors import ComputeDtypeError

COMPUTE_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)


def compute_dtype_of(asked: str | None, *, stored: torch.dtype, on_gpu: bool) -> torch.dtype:
    """The dtype of that name; None is float32 on a CPU and the `stored` one on a GPU.

    Raises ComputeDtypeError for a name that is none, and for float16 on a CPU.
    """
    if asked is None:
        return stored if on_gpu else torch.float32
    if asked not in COMPUTE_DTYPES:
        raise ComputeDtypeError(
            f"{asked!r} is nothing to compute in: choose one of {', '.join(COMPUTE_DTYPES)}"
        )
    dtype = COMPUTE_DTYPES[asked]
    if dtype == torch.float16 and not on_gpu:
        raise ComputeDtypeError(
            "float16 is computed in on a GPU only: a CPU multiplies it several times slower than "
            "float32; bfloat16 is as small, and faster where the CPU has instructions for it"
        )
    return dtype
