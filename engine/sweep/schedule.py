"""The order of one sweep, and nothing else: which layer, which micro-batch, when weights change."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """One layer of one micro-batch. `is_first` and `is_last` mark the layer's visit."""

    layer: int
    micro_batch: int
    is_first: bool
    is_last: bool


def steps(num_layers: int, num_micro_batches: int) -> Iterator[Step]:
    """Visit every layer once; in each, every micro-batch: weights are fetched once a sweep."""
    last = num_micro_batches - 1
    for layer in range(num_layers):
        for micro_batch in range(num_micro_batches):
            yield Step(layer, micro_batch, micro_batch == 0, micro_batch == last)


def pack_micro_batches(lengths: Sequence[int], *, max_tokens: int) -> list[range]:
    """Cut consecutive segments into micro-batches of at most `max_tokens`, by index.

    A segment is never cut here: none may be longer than `max_tokens`.
    """
    cuts = [0]
    tokens = 0
    for index, length in enumerate(lengths):
        assert length <= max_tokens, f"a segment of {length} tokens in batches of {max_tokens}"
        if tokens + length > max_tokens:
            cuts.append(index)
            tokens = 0
        tokens += length
    return [range(*pair) for pair in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]
