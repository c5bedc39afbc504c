"""Which kernel multiplies, by how many rows there are: measured once on the machine at hand. Knows
no weights.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows, in) by (out, in), both contiguous, to (rows, out)."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""(rows, in) by one weight to (rows, out)."""

_ROW_COUNTS: Final = (1, 8, 32, 128, 512)
_PACKED_FOR_ROWS: Final = 64  # a layout serves any number of rows, and this many best
_NUM_WEIGHTS: Final = 4
_NUM_TRIALS: Final = 4  # after a first one, which sets a kernel up


class Gemm:
    """The kernel for each number of rows; `reason` says which and why.

    With `packs`, weights that stay may be laid out once as oneDNN likes them (`packed`).
    """

    def __init__(
        self, kernels: Sequence[tuple[int, Kernel]], *, reason: str, packs: bool = False
    ) -> None:
        """`kernels` are (largest number of rows, kernel), ascending; the last serves all above."""
        self._kernels = tuple(kernels)
        self.reason = reason
        self.packs = packs

    def kernel(self, num_rows: int) -> Kernel:
        for most_rows, kernel in self._kernels:
            if num_rows <= most_rows:
                return kernel
        return self._kernels[-1][1]


def choose_gemm(shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> Gemm:
    """For matrices like (out, in) `shape`; only a CPU has a choice. Takes tens of ms."""
    name = str(dtype).removeprefix("torch.")
    kernels = kernels_for(dtype, device)
    if len(kernels) == 1:
        return Gemm([(1, F.linear)], reason=f"{device.type} {name}: torch's own kernel")
    # In turns: no tile of weights is in a core's cache when its turn comes.
    weights = [torch.ones(shape, dtype=dtype) for _ in range(_NUM_WEIGHTS)]
    chosen: list[tuple[int, Kernel]] = []
    seen = []
    for num_rows in _ROW_COUNTS:
        rows = torch.ones(num_rows, shape[1], dtype=dtype)
        taken_s = _best_seconds(kernels, rows, weights)
        best = min(taken_s, key=lambda name: taken_s[name])
        chosen.append((num_rows, kernels[best]))
        gflops = 2 * num_rows * math.prod(shape) / taken_s[best] / 1e9
        seen.append((best, f"{num_rows} ({gflops:.0f} GFLOP/s)"))
    ranges = [
        f"{name} at {', '.join(at for _, at in group)} rows"
        for name, group in itertools.groupby(seen, key=lambda each: each[0])
    ]
    where = f"{shape[0]} x {shape[1]} {name} on this CPU"
    return Gemm(chosen, packs=True, reason=f"{where}: {'; '.join(ranges)}")


def kernels_for(dtype: torch.dtype, device: torch.device) -> dict[str, Kernel]:
    """By name, every kernel that multiplies such values there: torch's own, and oneDNN's for the
    dtypes that it has instructions for.
    """
    kernels: dict[str, Kernel] = {"torch": F.linear}
    if device.type == "cpu" and _has_onednn(dtype):
        kernels["oneDNN"] = multiply_packed
    return kernels


def products_with(weight: torch.Tensor) -> dict[str, Product]:
    """By name, every way to multiply by a plain (out, in) weight, the packed one among them."""
    kernels = kernels_for(weight.dtype, weight.device)
    products: dict[str, Product] = {
        name: functools.partial(_multiply_by, kernel, weight) for name, kernel in kernels.items()
    }
    if "oneDNN" in kernels:
        products["oneDNN, packed"] = functools.partial(
            _multiply_by, multiply_packed, packed(weight)
        )
    return products


def _multiply_by(kernel: Kernel, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return kernel(rows, weight)


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A float32 or bfloat16 (out, in) weight in the layout that oneDNN computes from;
    `multiply_packed` alone can read it. As many bytes as before.
    """
    laid_out: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)  # noqa: SLF001  # no public name
    return laid_out


def multiply_packed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """By oneDNN, which takes plain weights too: (rows, in) by (out, in) to (rows, out)."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")  # noqa: SLF001  # no public name takes a plain weight
    return product


def multiply_to_float32(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """On a GPU: 16-bit (rows, in) by (out, in) of the same dtype to float32 (rows, out), whose sums
    are not rounded to 16 bits.
    """
    return torch.mm(rows, weight.t(), out_dtype=torch.float32)


def _has_onednn(dtype: torch.dtype) -> bool:
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):  # noqa: SLF001  # the public name is untyped
        return False
    if dtype == torch.bfloat16:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001  # no public name
        return supported
    return dtype == torch.float32


def _best_seconds(
    kernels: Mapping[str, Kernel], rows: torch.Tensor, weights: Sequence[torch.Tensor]
) -> dict[str, float]:
    """By kernel, the best of some trials. They take turns, so that others' load meets them alike."""
    taken_s = dict.fromkeys(kernels, math.inf)
    for trial in range(1 + _NUM_TRIALS):
        for name, kernel in kernels.items():
            weight = weights[trial % len(weights)]
            taken_s[name] = min(taken_s[name], _seconds(kernel, rows, weight))
    return taken_s


def _seconds(kernel: Kernel, rows: torch.Tensor, weight: torch.Tensor) -> float:
    started_s = time.perf_counter()
    kernel(rows, weight)
    return max(time.perf_counter() - started_s, 1e-9)
