"""The order of one sweep, and nothing else: which layer, which micro-batch, when weights change."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
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


def with_next(order: Iterable[Step]) -> Iterator[tuple[Step, Step | None]]:
    """Each step with the one after it, so that what that one needs can be fetched beside this one."""
    whole: list[Step | None] = [*order, None]
    for step, coming in itertools.pairwise(whole):
        assert step is not None
        yield step, coming


def pack_micro_batches(sizes: Sequence[tuple[int, ...]], *, limits: tuple[int, ...]) -> list[range]:
    """Cut consecutive segments into micro-batches by index: of each of a segment's sizes (new tokens,
    say, and cached ones) a micro-batch carries at most the limit in sum.

    A segment is never cut here: one that is over a limit goes alone.
    """
    cuts = [0]
    sums = [0] * len(limits)
    for index, segment in enumerate(sizes):
        sums = [total + size for total, size in zip(sums, segment, strict=True)]
        if index > cuts[-1] and any(s > limit for s, limit in zip(sums, limits, strict=True)):
            cuts.append(index)
            sums = list(segment)
    return [range(*pair) for pair in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]
