"""Attention of decoding rows over the paged cache, two calls for all of them however ragged: for the
CPU.

A slot that such a row sees is one score and one weight of each of its heads: elements of a sparse
matrix, whose kernels read what the elements name and nothing else. Knows no prefixes and no model.
"""

import functools
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Final

import torch
import torch.nn.functional as F

from engine.compute.segments import Head, Span
from engine.planning.cost import WIDENED_BYTES

Seen = tuple[int, Span]
"""A decoding row: its token's place in the packing, and what it sees of the cache."""

_MOST_HEADS_TO_A_KEY: Final = 8
"""Each query head reads a key for itself, though from the CPU's cache: with more of them to a key,
a call of the flash kernel for each row is faster.
"""

_MOST_HEADS_TO_A_16_BIT_KEY: Final = 4


def suits_lookup(num_heads: int, keys: torch.Tensor) -> bool:
    """Whether it is faster than a call for each row; `keys` (kv_heads, slots, size)."""
    most = _MOST_HEADS_TO_A_16_BIT_KEY if _is_16_bit(keys) else _MOST_HEADS_TO_A_KEY
    return num_heads <= most * keys.shape[0]


def plan_lookups(
    rows: Sequence[Seen], *, num_heads: int, keys: torch.Tensor
) -> "tuple[Lookup, ...]":
    """For all layers whose pools are like `keys` (kv_heads, slots, size)."""
    groups: Iterator[Sequence[Seen]] = iter([rows] if rows else [])
    if _is_16_bit(keys):
        # Of keys the copies, of each head's weights those in the values' dtype.
        slot_bytes = keys.shape[0] * keys.shape[2] * torch.float32.itemsize
        slot_bytes += num_heads * keys.itemsize
        groups = _grouped(rows, most_slots=WIDENED_BYTES // slot_bytes)
    return tuple(Lookup(group, num_heads=num_heads, keys=keys) for group in groups)


class Lookup:
    """The slots that some rows see, and room for their scores: one layer uses it at a time."""

    def __init__(self, rows: Sequence[Seen], *, num_heads: int, keys: torch.Tensor) -> None:
        rows = _dealt(rows)
        num_kv_heads, num_slots, _ = keys.shape
        self.tokens = torch.tensor([token for token, _ in rows])
        """The rows' places in the packing (rows,)."""
        self._spans = [span for _, span in rows]
        lengths = [span.num_tokens for span in self._spans]
        kv_heads = torch.arange(num_heads, dtype=torch.int32) // (num_heads // num_kv_heads)
        firsts = [span.slot for span in self._spans]
        self._values_at = keys_at = _places(firsts, lengths, kv_heads * num_slots)
        if _is_16_bit(keys):
            *firsts, num_slots = itertools.accumulate(lengths, initial=0)
            keys_at = _places(firsts, lengths, kv_heads * num_slots)
        self._num_slots = num_slots
        # The elements of one head of one row end where those of the next begin.
        counts = torch.tensor(lengths, dtype=torch.int32).repeat_interleave(num_heads)
        self._ends = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        shape = (len(counts), num_kv_heads * num_slots)
        self._elements = _elements(self._ends, keys_at, shape=shape, dtype=_scored_as(keys.dtype))
        self._by_row = _by_row(self._elements.values(), lengths, num_heads)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        head: Head,
        wants_sums: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`query` (rows, heads, size), keys and values (kv_heads, slots, size), the pool of a layer;
        returns (rows, heads, value_size) and the log-sum-exp of the scores, (rows, heads).
        """
        num_rows, num_heads, size = query.shape
        keys = self._widened(keys) if _is_16_bit(keys) else keys
        torch.sparse.sampled_addmm(
            self._elements,
            query.to(keys.dtype).reshape(-1, size),
            keys.view(-1, size).t(),
            beta=0.0,
            alpha=head.scaling,
            out=self._elements,
        )
        sums = self._weigh(head, wants_sums=wants_sums)
        answer = F.embedding_bag(
            self._values_at,
            values.view(-1, values.shape[-1]),
            self._ends[:-1],
            mode="sum",
            per_sample_weights=self._elements.values().to(values.dtype),
        )
        return (
            answer.view(num_rows, num_heads, -1),
            None if sums is None else sums.view(num_rows, num_heads),
        )

    def _weigh(self, head: Head, *, wants_sums: bool) -> torch.Tensor | None:
        """Turn scores into weights where they lie."""
        scores = self._elements.values()
        if head.softcap is not None:
            scores.div_(head.softcap).tanh_().mul_(head.softcap)
        if not wants_sums:
            for row in self._by_row:
                torch.softmax(row, dim=-1, out=row)
            return None
        firsts = scores[self._ends[:-1]]
        for row in self._by_row:
            torch.log_softmax(row, dim=-1, out=row)
        sums = firsts - scores[self._ends[:-1]]
        scores.exp_()
        return sums

    def _widened(self, keys: torch.Tensor) -> torch.Tensor:
        """The rows' keys end to end, (kv_heads, slots, size), in the dtype of scores."""
        num_kv_heads, _, size = keys.shape
        dtype = _scored_as(keys.dtype)
        copies = torch.empty(num_kv_heads, self._num_slots, size, dtype=dtype)
        places = torch.split(copies, [span.num_tokens for span in self._spans], dim=1)
        for place, span in zip(places, self._spans, strict=True):
            place.copy_(keys[:, span.slot : span.slot + span.num_tokens])
        return copies


def _is_16_bit(keys: torch.Tensor) -> bool:
    return _scored_as(keys.dtype) != keys.dtype


def _scored_as(dtype: torch.dtype) -> torch.dtype:
    """What the kernel of scores takes, and what they should not be rounded below."""
    return torch.promote_types(dtype, torch.float32)


def _places(
    first_slots: Sequence[int], lengths: Sequence[int], head_starts: torch.Tensor
) -> torch.Tensor:
    """Of every element, in order of row, head and slot, the slot's place where the slots of all key
    heads lie end to end; those of a query head's key head start at `head_starts` (heads,).
    """
    num_heads = len(head_starts)
    places = torch.empty(num_heads * sum(lengths), dtype=torch.int32)
    at = torch.arange(max(lengths), dtype=torch.int32)
    by_row = _by_row(places, lengths, num_heads)
    for row, first, length in zip(by_row, first_slots, lengths, strict=True):
        torch.add((head_starts + first)[:, None], at[:length], out=row)
    return places


def _by_row(elements: torch.Tensor, lengths: Sequence[int], num_heads: int) -> list[torch.Tensor]:
    """(heads, slots that it sees) of each row."""
    parts = torch.split(elements, [num_heads * length for length in lengths])
    return [part.view(num_heads, -1) for part in parts]


def _elements(
    ends: torch.Tensor, places: torch.Tensor, *, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The kernel adds to what was there, times nothing: so it is nothing, and finite."""
    _let_torch_warn_of_sparse_tensors()
    values = torch.zeros(len(places), dtype=dtype)
    return torch.sparse_csr_tensor(ends, places, values, size=shape, check_invariants=False)


@functools.cache
def _let_torch_warn_of_sparse_tensors() -> None:
    """It does so once a process, and nobody who would read it can do anything about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(index, index[:0], torch.zeros(0), size=(0, 0))


def _dealt(rows: Sequence[Seen]) -> list[Seen]:
    """In an order that gives each thread, which gets as many as any other, about as many slots."""
    by_length = sorted(rows, key=lambda row: row[1].num_tokens, reverse=True)
    num_threads = torch.get_num_threads()
    return list(
        itertools.chain.from_iterable(by_length[i::num_threads] for i in range(num_threads))
    )


def _grouped(rows: Sequence[Seen], *, most_slots: int) -> Iterator[list[Seen]]:
    """With at most so many slots in a group of several."""
    group: list[Seen] = []
    num_slots = 0
    for row in rows:
        if group and num_slots + row[1].num_tokens > most_slots:
            yield group
            group, num_slots = [], 0
        group.append(row)
        num_slots += row[1].num_tokens
    if group:
        yield group
