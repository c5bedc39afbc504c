"""What is waiting to be run, as lengths and how often each comes; knows no file and no tokens."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Self

from engine.errors import WorkloadError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`count` rows that are alike. `num_shared_tokens` of the prompt are common with others of its
    job: computed once, kept once. `num_output_tokens` are expected, `max_output_tokens` allowed.

    Raises WorkloadError for lengths that no row can have.
    """

    num_prompt_tokens: int
    num_output_tokens: float
    max_output_tokens: int
    num_shared_tokens: int = 0
    count: float = 1.0

    def __post_init__(self) -> None:
        lengths = (
            self.num_prompt_tokens >= 1
            and 0 <= self.num_shared_tokens < self.num_prompt_tokens
            and 1 <= self.num_output_tokens <= self.max_output_tokens
            and self.count > 0
        )
        if not lengths:
            raise WorkloadError(f"no row is like {self}")

    @property
    def num_own_tokens(self) -> int:
        """Prompt tokens that the row computes and keeps for itself."""
        return self.num_prompt_tokens - self.num_shared_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)  # no slots: means are kept
class Workload:
    """`num_rows` rows in all, distributed as `requests` are by their counts."""

    requests: tuple[Request, ...]
    num_rows: int

    def __post_init__(self) -> None:
        if not self.requests or self.num_rows < 1:
            raise WorkloadError(
                f"a workload has rows: {len(self.requests)} samples for {self.num_rows} rows"
            )

    @classmethod
    def of(cls, requests: Sequence[Request], *, num_rows: int | None = None) -> Self:
        """Of samples; without `num_rows` they are all there is."""
        counted = round(sum(request.count for request in requests))
        return cls(
            requests=tuple(requests), num_rows=max(1, counted) if num_rows is None else num_rows
        )

    @classmethod
    def uniform(cls, num_prompt_tokens: int, num_output_tokens: int, *, num_rows: int) -> Self:
        """Rows that are all alike and end at their limit."""
        request = Request(
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            max_output_tokens=num_output_tokens,
            count=num_rows,
        )
        return cls(requests=(request,), num_rows=num_rows)

    def mean(self, value: Callable[[Request], float]) -> float:
        """Of all rows, each as often as it comes."""
        total = sum(request.count for request in self.requests)
        return sum(request.count * value(request) for request in self.requests) / total

    def quantile(self, value: Callable[[Request], float], share: float) -> float:
        """The least value that `share` of the rows do not exceed."""
        pairs = sorted((value(request), request.count) for request in self.requests)
        rest = share * sum(count for _, count in pairs)
        for each, count in pairs:
            rest -= count
            if rest <= 1e-9:
                return each
        return pairs[-1][0]

    @functools.cached_property
    def mean_prompt_tokens(self) -> float:
        return self.mean(lambda request: request.num_prompt_tokens)

    @functools.cached_property
    def mean_own_tokens(self) -> float:
        """Prompt tokens that a row computes for itself."""
        return self.mean(lambda request: request.num_own_tokens)

    @functools.cached_property
    def mean_output_tokens(self) -> float:
        return self.mean(lambda request: request.num_output_tokens)

    @functools.cached_property
    def prompt_tokens_per_output(self) -> float:
        """Prompt tokens that a sweep computes for each it generates, in steady state."""
        return self.mean_own_tokens / self.mean_output_tokens

    @functools.cached_property
    def mean_live_tokens(self) -> float:
        """Cached tokens of its own of a row that is seen running at any time.

        A row is seen as often as it has sweeps, so that the long count for more: the mean over rows
        of g * (s + g / 2) over the mean of g, with s own prompt tokens and g generated ones.
        """
        return self._over_life(lambda each: each.num_own_tokens + each.num_output_tokens / 2)

    @functools.cached_property
    def mean_context_tokens(self) -> float:
        """What a row that is seen running attends to: its shared tokens too."""
        return self._over_life(lambda each: each.num_prompt_tokens + each.num_output_tokens / 2)

    @functools.cached_property
    def mean_prompt_pairs(self) -> float:
        """What a row's own prompt tokens attend to, themselves among it, one by one: the sum."""
        return self.mean(
            lambda each: (
                each.num_own_tokens * (each.num_shared_tokens + (each.num_own_tokens + 1) / 2)
            )
        )

    @functools.cached_property
    def num_kept_once_tokens(self) -> int:
        """An upper bound of tokens kept once for all rows: the longest shared part."""
        return max(request.num_shared_tokens for request in self.requests)

    @functools.cached_property
    def longest_tokens(self) -> int:
        """Prompt and output of the longest row that is allowed."""
        return max(each.num_prompt_tokens + each.max_output_tokens for each in self.requests)

    def _over_life(self, value: Callable[[Request], float]) -> float:
        lived = self.mean(lambda each: each.num_output_tokens * value(each))
        return lived / self.mean_output_tokens
