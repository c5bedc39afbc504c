"""Multiplies by weights that lie in slices, in stored dtype: no copy of a whole matrix ever exists.

Takes the forward of every module that holds a sliced weight. Knows nothing of where slices come
from.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from engine.compute.gemm import (
    Gemm,
    Kernel,
    choose_gemm,
    multiply_packed,
    multiply_to_float32,
    packed,
)
from engine.memory.matrix import Matrix, Stack, values_of
from engine.planning.cost import TILE_BYTES

MULTIPLIER_ATTRIBUTE: Final = "freight_multiplier"
"""Where modules that hold a `Stack` find the multiplier."""

_MOST_TILE_ROWS: Final = 1024
_LEAST_TILE_ROWS: Final = 32


@dataclasses.dataclass(slots=True)
class ProductCounters:
    """Seconds that products have taken, making weights ready among them and waiting for them not. Of a GPU
    0: there they are only asked for.
    """

    taken_s: float = 0.0


class Multiplier:
    """Multiplies by stored rows, tile by tile where they must be converted first."""

    def __init__(self, gemm: Gemm, device: torch.device) -> None:
        self.gemm = gemm
        self.counters = ProductCounters()
        self._is_timed = device.type == "cpu"
        self._scratch = torch.empty(TILE_BYTES, dtype=torch.uint8, device=device)

    def linear(
        self, inputs: torch.Tensor, weight: Matrix, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """(..., in) to (..., out): what `nn.Linear` does, or Conv1D if the matrix is transposed."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        if self._is_one_call(flat, weight):
            product = self._kernel(flat, weight.slices[0].stored)
        elif weight.transposed:
            summed = _sums(flat, weight.shape[1])
            for part in weight.slices:
                self.add_transposed(flat[:, part.first : part.last], part.stored, summed)
            product = summed.to(flat.dtype)
        else:
            product = flat.new_empty(len(flat), weight.shape[0])
            for part in weight.slices:
                self.multiply(flat, part.stored, product[:, part.first : part.last])
        if bias is not None:
            product += bias
        return product.view(*inputs.shape[:-1], product.shape[1])

    def product(
        self,
        rows: torch.Tensor,
        stored: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        transposed: bool,
    ) -> torch.Tensor:
        """(rows, in) by one stored matrix, (out, in) or (in, out) if `transposed`: (rows, out)."""
        if transposed:
            summed = _sums(rows, stored.shape[1])
            self.add_transposed(rows, stored, summed)
            found = summed.to(rows.dtype)
        else:
            found = rows.new_empty(len(rows), stored.shape[0])
            self.multiply(rows, stored, found)
        return found if bias is None else found.add_(bias)

    def multiply(self, rows: torch.Tensor, stored: torch.Tensor, product: torch.Tensor) -> None:
        """(rows, in) by stored (out, in) into `product` (rows, out), a view if need be."""
        if not len(rows):
            return
        with self._timed():
            if stored.is_mkldnn:
                product.copy_(multiply_packed(rows, stored))
            else:
                self._multiply(self.gemm.kernel(len(rows)), rows, stored, product)

    def _multiply(
        self, kernel: Kernel, rows: torch.Tensor, stored: torch.Tensor, product: torch.Tensor
    ) -> None:
        rows = rows.contiguous()
        tile = self._tile_rows(stored, rows.dtype)
        for first in range(0, len(stored), tile):
            values = values_of(
                stored[first : first + tile], dtype=rows.dtype, scratch=self._scratch
            )
            product[:, first : first + tile] = kernel(rows, values)

    def logits(self, rows: torch.Tensor, stored: torch.Tensor, product: torch.Tensor) -> None:
        """As `multiply`, into a float32 `product` of which no value was rounded to 16 bits.

        On a CPU a product of 16-bit values comes in 16 bits only, so it is one of float32 values.
        """
        if rows.device.type != "cpu" and rows.itemsize == 2:
            self._multiply(multiply_to_float32, rows, stored, product)
        else:
            self.multiply(rows.float(), stored, product)

    def add_transposed(
        self, rows: torch.Tensor, stored: torch.Tensor, product: torch.Tensor
    ) -> None:
        """Adds (rows, in) by stored (in, out) to `product` (rows, out), of float32 at least."""
        with self._timed():
            tile = self._tile_rows(stored, rows.dtype)
            for first in range(0, len(stored), tile):
                values = values_of(
                    stored[first : first + tile], dtype=rows.dtype, scratch=self._scratch
                )
                share = rows[:, first : first + tile]
                if product.dtype == share.dtype:
                    product.addmm_(share, values)
                else:
                    product += share @ values

    def _is_one_call(self, rows: torch.Tensor, weight: Matrix) -> bool:
        """Whether all of the matrix lies here, ready to be multiplied by."""
        if weight.transposed or len(weight.slices) > 1 or not len(rows):
            return False
        stored = weight.slices[0].stored
        if stored.is_mkldnn:
            return True
        return stored.dtype == rows.dtype and self._tile_rows(stored, rows.dtype) >= len(stored)

    def _kernel(self, rows: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        with self._timed():
            if stored.is_mkldnn:
                return multiply_packed(rows, stored)
            return self.gemm.kernel(len(rows))(rows.contiguous(), stored)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        if self._is_timed:
            self.counters.taken_s += time.perf_counter() - started_s

    def _tile_rows(self, stored: torch.Tensor, dtype: torch.dtype) -> int:
        """All rows at once, unless they must be converted or a CPU kernel may copy them."""
        if stored.dtype == dtype and (stored.device.type != "cpu" or stored.nbytes <= TILE_BYTES):
            return len(stored)
        return _most_tile_rows(stored.shape[1], dtype)


def attach_multiplier(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Multiplier:
    """Give every module that holds a sliced weight a forward, or the multiplier, of ours."""
    multiplier = Multiplier(_choose(model, dtype, device), device)
    if multiplier.gemm.packs:
        _pack_what_stays(model)
    for module in model.modules():
        held = vars(module).values()
        if any(isinstance(value, Stack) for value in held):
            setattr(module, MULTIPLIER_ATTRIBUTE, multiplier)
        if isinstance(vars(module).get("weight"), Matrix):
            module.forward = functools.partial(_forward, module, multiplier)
    return multiplier


def _sums(rows: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """Zeros to add products of `rows` to: many of 16 bits would lose what is added last."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_zeros(len(rows), num_outputs, dtype=dtype)


def _pack_what_stays(model: Any) -> None:
    """In the dtype that it is computed in, unless that takes more bytes than are stored.

    One after the other, so that no more than one of them is there twice. Not the head: a tied one is
    read row by row as well.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        weight = vars(module).get("weight")
        if module is head or not isinstance(weight, Matrix) or weight.transposed:
            continue
        for part in weight.slices:
            if part.is_bound and part.stored.itemsize >= weight.dtype.itemsize:
                part.bind(packed(part.stored.to(weight.dtype)))


def _choose(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Gemm:
    """Measured on tiles of the model's largest matrix."""
    shapes = [
        tuple(value.shape[-2:])
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Matrix | Stack)
    ]
    num_rows, num_columns = max(shapes, key=math.prod, default=(1, 1))
    tile_rows = min(num_rows, _most_tile_rows(num_columns, dtype))
    return choose_gemm((tile_rows, num_columns), dtype=dtype, device=device)


def _most_tile_rows(num_columns: int, dtype: torch.dtype) -> int:
    fitting = TILE_BYTES // (num_columns * dtype.itemsize)
    rounded = fitting // _LEAST_TILE_ROWS * _LEAST_TILE_ROWS
    return min(_MOST_TILE_ROWS, rounded or max(1, fitting))


def _forward(module: Any, multiplier: Multiplier, inputs: torch.Tensor) -> torch.Tensor:
    return multiplier.linear(inputs, module.weight, module.bias)
