"""The jobs of the benchmarks: seeded prompts as token ids, with how many tokens each is to get."""

import argparse
import collections
import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Self

from engine.planning import workload as planning
from engine.planning.cost import KV_PAGE_TOKENS
from worker.grouping import num_shared

_FIRST_TOKEN: Final = 2  # 0 and 1 begin and end a sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and the number of tokens to answer with; fewer only where an end may come."""

    key: str
    token_ids: tuple[int, ...]
    max_tokens: int

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(
            key=fields["key"],
            token_ids=tuple(fields["token_ids"]),
            max_tokens=fields["max_tokens"],
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`is_static` where all lengths are equal: a padded batch then wastes nothing.

    `shared_tokens` begin every prompt.
    """

    name: str
    requests: tuple[Request, ...]
    is_static: bool
    shared_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many rows, and how long: medians, for the ragged workload."""

    rows: int
    prompt_tokens: int
    output_tokens: int
    prefix_prompt_tokens: int
    prefix_share: float
    seed: int

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Self:
        return cls(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(cls)})


def uniform(sizes: Sizes, vocab: int) -> Workload:
    draw = random.Random(sizes.seed)
    requests = tuple(
        Request(
            key=str(index),
            token_ids=_tokens(draw, vocab, sizes.prompt_tokens),
            max_tokens=sizes.output_tokens,
        )
        for index in range(sizes.rows)
    )
    return Workload(name="uniform", requests=requests, is_static=True)


def ragged(sizes: Sizes, vocab: int) -> Workload:
    """Log-normal prompts and outputs: between a quarter of the median and four times it."""
    draw = random.Random(sizes.seed + 1)

    def length(median: int, sigma: float) -> int:
        drawn = round(draw.lognormvariate(math.log(median), sigma))
        return min(max(drawn, 1, median // 4), 4 * median)

    requests = tuple(
        Request(
            key=str(index),
            token_ids=_tokens(draw, vocab, length(sizes.prompt_tokens, 0.7)),
            max_tokens=length(sizes.output_tokens, 0.7),
        )
        for index in range(sizes.rows)
    )
    return Workload(name="ragged", requests=requests, is_static=False)


def prefix(sizes: Sizes, vocab: int) -> Workload:
    """Prompts of one length that begin alike."""
    draw = random.Random(sizes.seed + 2)
    shared = _tokens(draw, vocab, round(sizes.prefix_share * sizes.prefix_prompt_tokens))
    own_tokens = sizes.prefix_prompt_tokens - len(shared)
    requests = tuple(
        Request(
            key=str(index),
            token_ids=shared + _tokens(draw, vocab, own_tokens),
            max_tokens=sizes.output_tokens,
        )
        for index in range(sizes.rows)
    )
    return Workload(name="prefix", requests=requests, is_static=True, shared_tokens=len(shared))


def _tokens(draw: random.Random, vocab: int, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(_FIRST_TOKEN, vocab) for _ in range(count))


WORKLOADS: Final[Mapping[str, Callable[[Sizes, int], Workload]]] = MappingProxyType(
    {"uniform": uniform, "ragged": ragged, "prefix": prefix}
)


def workload_of(requests: Sequence[Request]) -> planning.Workload:
    """The lengths that really run, each as often as it comes; of what all begin with, the whole pages."""
    alike = min(num_shared(requests[0].token_ids, each.token_ids) for each in requests)
    shared = alike // KV_PAGE_TOKENS * KV_PAGE_TOKENS
    counted = collections.Counter((len(each.token_ids), each.max_tokens) for each in requests)
    return planning.Workload.of(
        [
            planning.Request(
                num_prompt_tokens=prompt,
                num_output_tokens=output,
                max_output_tokens=output,
                # The last token of a prompt is computed for its own row.
                num_shared_tokens=min(shared, (prompt - 1) // KV_PAGE_TOKENS * KV_PAGE_TOKENS),
                count=count,
            )
            for (prompt, output), count in counted.items()
        ]
    )
