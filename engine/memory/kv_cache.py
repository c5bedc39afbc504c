"""Keys and values of the running rows on one tier: a paged pool a layer, given out in runs of pages.

A row's pages are contiguous, so that attention reads a view of them and copies nothing; when a row
outgrows its run it moves to a larger one. Knows slots and pages, not rows or tokens' meaning.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine.memory.pages import PageAllocator, PageRun, pages_for
from engine.memory.spill import SpillFile
from engine.memory.tiers import HostBuffer
from engine.planning.cost import KV_PAGE_TOKENS
from engine.planning.policy import Tier


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """One layer's keys and values of one token. A layer that attends over those of an earlier one
    has none of its own: `owner` is that layer's index.
    """

    num_heads: int
    key_size: int
    value_size: int
    owner: int | None = None

    def token_bytes(self, dtype: torch.dtype) -> int:
        if self.owner is not None:
            return 0
        return self.num_heads * (self.key_size + self.value_size) * dtype.itemsize


class KVCache:
    """The pool of every layer that has its own, within `budget_bytes` of `tier`; on disk, of `spill_dir`. Close it."""

    def __init__(
        self,
        shapes: Sequence[KVShape],
        *,
        budget_bytes: int,
        dtype: torch.dtype,
        tier: Tier = Tier.CPU,
        spill_dir: Path | None = None,
    ) -> None:
        token_bytes = sum(shape.token_bytes(dtype) for shape in shapes)
        self.pages = PageAllocator(budget_bytes // (token_bytes * KV_PAGE_TOKENS))
        self.tier = tier
        self.device = torch.device("cuda" if tier is Tier.GPU else "cpu")
        self.dtype = dtype
        self._spill: SpillFile | None = None
        if tier is Tier.DISK and self.pages.num_pages:
            assert spill_dir is not None, "keys and values on disk need a folder"
            self._spill = SpillFile(spill_dir, token_bytes * self.num_tokens)
        self._owners = [index if s.owner is None else s.owner for index, s in enumerate(shapes)]
        owning = [index for index, owner in enumerate(self._owners) if index == owner]
        pools = self._lay_out([shapes[index] for index in owning])
        self._layers = dict(zip(owning, pools, strict=True))

    def _lay_out(self, shapes: Sequence[KVShape]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Head first: a row's view of one head is one contiguous piece of memory. Zeros: attention
        may look behind a row's end and give what it finds no weight, and 0 * NaN is NaN.
        """
        end = 0
        for shape in shapes:
            pools = []
            for size in (shape.key_size, shape.value_size):
                dims = (shape.num_heads, self.num_tokens, size)
                num_bytes = math.prod(dims) * self.dtype.itemsize
                if self._spill is None:
                    pools.append(_zeros(dims, self.dtype, self.device))
                else:
                    raw = self._spill.bytes[end : end + num_bytes]
                    pools.append(raw.view(self.dtype).view(dims))
                end += num_bytes
            yield pools[0], pools[1]

    @property
    def num_tokens(self) -> int:
        return self.pages.num_pages * KV_PAGE_TOKENS

    def allocate(self, num_tokens: int) -> PageRun | None:
        """A run for at least `num_tokens`, or None if no run of that length is free."""
        return self.pages.allocate(pages_for(num_tokens))

    def release(self, run: PageRun) -> None:
        self.pages.release(run)

    def scrub(self, run: PageRun) -> None:
        """Forget what the run holds: a broken row's values may not be numbers."""
        for pool in self.pools():
            pool[:, run.slot : run.slot + run.num_tokens] = 0

    def move(self, old: PageRun, new: PageRun, num_tokens: int) -> None:
        """Copy the first `num_tokens` of every layer from `old` to `new`, then release `old`."""
        for pool in self.pools():
            pool[:, new.slot : new.slot + num_tokens] = pool[:, old.slot : old.slot + num_tokens]
        self.release(old)

    def regrow(self, run: PageRun, num_tokens: int, *, num_used: int) -> PageRun | None:
        """A larger run in place of `run`, over its pages and free ones, with its first `num_used`
        tokens; None leaves `run` as it was.
        """
        larger = self.pages.regrow(run, pages_for(num_tokens))
        if larger is not None and larger.slot != run.slot:
            for pool in self.pools():
                used = pool[:, run.slot : run.slot + num_used].clone()  # the runs may overlap
                pool[:, larger.slot : larger.slot + num_used] = used
        return larger

    def adopt(self, source: "KVCache", slot: int, num_tokens: int, target_slot: int) -> None:
        """Copy tokens of another tier's pool, of every layer, to `target_slot` on."""
        for mine, theirs in zip(self.pools(), source.pools(), strict=True):
            mine[:, target_slot : target_slot + num_tokens] = theirs[:, slot : slot + num_tokens]

    def read_ahead(self, index: int, slot: int, num_tokens: int) -> None:
        """Have the kernel read a layer's tokens from the spill file; only on disk there is any."""
        if self._spill is None:
            return
        for pool in self.layer(index):
            begin = pool.data_ptr() - self._spill.bytes.data_ptr()
            for head in range(pool.shape[0]):
                first = head * pool.stride(0) + slot * pool.stride(1)
                self._spill.will_need(
                    begin + first * pool.itemsize, num_tokens * pool.stride(1) * pool.itemsize
                )

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (heads, slots, key_size) and values (heads, slots, value_size) that a layer has, or
        shares with an earlier one.
        """
        return self._layers[self._owners[index]]

    def is_shared(self, index: int) -> bool:
        """Whether the layer attends over what an earlier one has written."""
        return self._owners[index] != index

    def close(self) -> None:
        """Give the pools up: their memory, and on disk their file, go with the last view of them."""
        self._layers.clear()
        self._spill = None

    def pools(self) -> Iterator[torch.Tensor]:
        """Keys, then values, of every layer that has its own."""
        for keys, values in self._layers.values():
            yield keys
            yield values


def _zeros(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU pages that the kernel zeroes when they are first written: `torch.zeros` would
    write, and so take, the whole budget at once.
    """
    if device.type != "cpu" or 0 in dims:
        return torch.zeros(dims, dtype=dtype, device=device)
    buffer = HostBuffer(math.prod(dims) * dtype.itemsize)
    return buffer.bytes.view(dtype).view(dims)
