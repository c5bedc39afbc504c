"""Keys and values of the running rows: a paged pool a layer, handed out in runs of pages.

A row's pages are contiguous, so that attention reads a view of them and copies nothing; when a row
outgrows its run it moves to a larger one. Knows slots and pages, not rows or tokens' meaning.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import torch

from engine.memory.tiers import HostBuffer
from engine.planning.cost import KV_PAGE_TOKENS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """One layer's keys and values of one token."""

    num_heads: int
    key_size: int
    value_size: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        return self.num_heads * (self.key_size + self.value_size) * dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PageRun:
    """Contiguous pages; `slot` is the first token's place in the pool."""

    first_page: int
    num_pages: int

    @property
    def slot(self) -> int:
        return self.first_page * KV_PAGE_TOKENS

    @property
    def num_tokens(self) -> int:
        return self.num_pages * KV_PAGE_TOKENS


class PageAllocator:
    """First-fit runs of pages, free neighbours merged. Pure bookkeeping."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = [(0, num_pages)] if num_pages else []

    @property
    def num_free_pages(self) -> int:
        return sum(num_pages for _, num_pages in self._free)

    def allocate(self, num_pages: int) -> PageRun | None:
        for index, (first, available) in enumerate(self._free):
            if available >= num_pages:
                rest = (first + num_pages, available - num_pages)
                self._free[index : index + 1] = [rest] if rest[1] else []
                return PageRun(first_page=first, num_pages=num_pages)
        return None

    def release(self, run: PageRun) -> None:
        first, num_pages = run.first_page, run.num_pages
        index = bisect.bisect(self._free, (first, 0))
        before = sum(self._free[index - 1]) if index else 0
        after = self._free[index][0] if index < len(self._free) else self.num_pages
        assert before <= first <= after - num_pages, "pages released twice"
        if index < len(self._free) and after == first + num_pages:
            num_pages += self._free.pop(index)[1]
        if index and before == first:
            index -= 1
            first, before_pages = self._free.pop(index)
            num_pages += before_pages
        self._free.insert(index, (first, num_pages))

    def regrow(self, run: PageRun, num_pages: int) -> PageRun | None:
        """Give `run` back for a larger one that may overlap it; None leaves it as it was."""
        free = list(self._free)
        self.release(run)
        larger = self.allocate(num_pages)
        if larger is None:
            self._free = free
        return larger


class KVCache:
    """The pool of every layer, within `budget_bytes` on `device`."""

    def __init__(
        self,
        shapes: Sequence[KVShape],
        *,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        token_bytes = sum(shape.token_bytes(dtype) for shape in shapes)
        self.pages = PageAllocator(budget_bytes // (token_bytes * KV_PAGE_TOKENS))
        self.device = device
        self.dtype = dtype
        num_slots = self.pages.num_pages * KV_PAGE_TOKENS
        # Head first: a row's view of one head is one contiguous piece of memory. Zeros: attention
        # may look behind a row's end and give what it finds no weight, and 0 * NaN is NaN.
        self._keys = [
            _zeros((shape.num_heads, num_slots, shape.key_size), dtype, device) for shape in shapes
        ]
        self._values = [
            _zeros((shape.num_heads, num_slots, shape.value_size), dtype, device)
            for shape in shapes
        ]

    @property
    def num_tokens(self) -> int:
        return self.pages.num_pages * KV_PAGE_TOKENS

    def allocate(self, num_tokens: int) -> PageRun | None:
        """A run for at least `num_tokens`, or None if no run of that length is free."""
        return self.pages.allocate(-(-num_tokens // KV_PAGE_TOKENS))

    def release(self, run: PageRun) -> None:
        self.pages.release(run)

    def scrub(self, run: PageRun) -> None:
        """Forget what the run holds: a broken row's values may not be numbers."""
        for pool in (*self._keys, *self._values):
            pool[:, run.slot : run.slot + run.num_tokens] = 0

    def move(self, old: PageRun, new: PageRun, num_tokens: int) -> None:
        """Copy the first `num_tokens` of every layer from `old` to `new`, then release `old`."""
        for pool in (*self._keys, *self._values):
            pool[:, new.slot : new.slot + num_tokens] = pool[:, old.slot : old.slot + num_tokens]
        self.release(old)

    def regrow(self, run: PageRun, num_tokens: int, *, num_used: int) -> PageRun | None:
        """A larger run in place of `run`, over its pages and free ones, with its first `num_used`
        tokens; None leaves `run` as it was.
        """
        larger = self.pages.regrow(run, -(-num_tokens // KV_PAGE_TOKENS))
        if larger is not None and larger.slot != run.slot:
            for pool in (*self._keys, *self._values):
                used = pool[:, run.slot : run.slot + num_used].clone()  # the runs may overlap
                pool[:, larger.slot : larger.slot + num_used] = used
        return larger

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (heads, slots, key_size) and values (heads, slots, value_size) of one layer."""
        return self._keys[index], self._values[index]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU pages that the kernel zeroes when they are first written: `torch.zeros` would
    write, and so take, the whole budget at once.
    """
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=device)
    buffer = HostBuffer(math.prod(shape) * dtype.itemsize)
    return buffer.bytes.view(dtype).view(shape)
