"""Weights that lie in slices: what a module holds in a parameter's place. Knows no kernels, and not
when a slice's bytes are there.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from engine.memory.kinds import Owner
from engine.memory.manifest import TENSOR_ALIGNMENT_BYTES, align


def values_of(
    stored: torch.Tensor, *, dtype: torch.dtype, scratch: torch.Tensor | None
) -> torch.Tensor:
    """The values of stored rows: themselves, or converted to `dtype` in the uint8 `scratch`.

    The one place that knows how stored bytes become values.
    """
    if stored.dtype == dtype:
        return stored
    if scratch is None:
        return stored.to(dtype)
    values = scratch[: stored.numel() * dtype.itemsize].view(dtype).view(stored.shape)
    return values.copy_(stored)


class Slice:
    """Rows `first` to `last` of a matrix in stored dtype; None while its bytes are elsewhere.

    One of a stack may be bound to what fetches single rows of it instead.
    """

    __slots__ = ("_fetch", "_stored", "first", "last")

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self._stored: torch.Tensor | None = None
        self._fetch: Callable[[int], torch.Tensor] | None = None

    @property
    def stored(self) -> torch.Tensor:
        assert self._stored is not None, "a streamed slice is there between acquire and release"
        return self._stored

    @property
    def is_bound(self) -> bool:
        return self._stored is not None or self._fetch is not None

    def bind(self, stored: torch.Tensor) -> None:
        self._stored = stored

    def bind_rows(self, fetch: Callable[[int], torch.Tensor]) -> None:
        """`fetch(row)` gives one row, counted from the matrix's start, until the slice is unbound."""
        self._fetch = fetch

    def row(self, row: int) -> torch.Tensor:
        """Raises what fetching it does."""
        return self.stored[row - self.first] if self._fetch is None else self._fetch(row)

    def unbind(self) -> None:
        self._stored = None
        self._fetch = None


class Sliced:
    """A weight as contiguous slices of its first dimension, in order.

    `dtype` is what it is computed in; each slice keeps its stored dtype.
    """

    def __init__(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device, transposed: bool
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = device
        self.transposed = transposed
        self.slices: list[Slice] = []

    def add(self, first: int, last: int) -> Slice:
        """Slices are added in order, without gaps."""
        assert first == (self.slices[-1].last if self.slices else 0), "slices lie in order"
        self.slices.append(Slice(first, last))
        return self.slices[-1]


class Matrix(Sliced):
    """(out, in), or (in, out) if `transposed`: slices are then of input features."""


class Stack(Sliced):
    """Experts' matrices (experts, rows, columns): `stack[expert]` is one of them, as stored."""

    def __getitem__(self, expert: int) -> torch.Tensor:
        for part in self.slices:
            if part.first <= expert < part.last:
                return part.row(expert)
        raise IndexError(f"expert {expert} of a stack of {self.shape[0]}")


class Whole:
    """A parameter that the library computes with as one tensor, in compute dtype.

    `unpacked` is uint8 room that streamed values of another dtype are converted into.
    """

    def __init__(
        self, owner: Owner, *, dtype: torch.dtype, device: torch.device, is_streamed: bool
    ) -> None:
        self._module, self._attribute = owner
        self.dtype = dtype
        self._device = device
        self._is_streamed = is_streamed
        self.unpacked: torch.Tensor | None = None
        if is_streamed:
            self.unbind()

    def unpacked_bytes(self, stored_shape: Sequence[int]) -> int:
        """Room for one value of each element, on a cache line's border."""
        return align(math.prod(stored_shape) * self.dtype.itemsize, TENSOR_ALIGNMENT_BYTES)

    def bind(self, stored: torch.Tensor) -> None:
        scratch = self.unpacked if self._is_streamed else None
        value = values_of(stored, dtype=self.dtype, scratch=scratch)
        setattr(self._module, self._attribute, nn.Parameter(value, requires_grad=False))

    def unbind(self) -> None:
        nothing = torch.empty(0, dtype=self.dtype, device=self._device)
        setattr(self._module, self._attribute, nn.Parameter(nothing, requires_grad=False))
