"""What waits, in the few figures that a plan hangs on, and whether they have moved since."""

import dataclasses
from collections.abc import Sequence
from typing import Final, Self

from jobs.line_group import LineGroup, WaitingBatch

_DOUBT_LINES: Final = 32
"""Completed lines that weigh as much as the limits do: those that end first are the short ones."""

_MOVED: Final = 1.25
_ONE_PAGE_TOKENS: Final = 16.0
_ENOUGH_BLOCKS: Final = 4
"""More lines than fill the block so many times are as good as without end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowKind:
    """`num_rows` rows alike, in mean tokens; what is shared is a part of the prompt."""

    num_rows: float
    prompt_tokens: float
    shared_tokens: float
    output_tokens: float
    """As expected: what completed lines of its batch came to, or the limit."""
    limit_tokens: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueueShape:
    """All rows that wait or run, by kind. Nothing waits: no kinds."""

    kinds: tuple[RowKind, ...]

    @classmethod
    def of(cls, waiting: Sequence[WaitingBatch]) -> Self:
        """Open lines are taken to be a fair sample of their batch's."""
        return cls(kinds=tuple(kind for batch in waiting for kind in _kinds(batch)))

    @property
    def num_rows(self) -> float:
        return sum(kind.num_rows for kind in self.kinds)

    @property
    def longest_tokens(self) -> float:
        """Prompt and limit of the longest kind; 0 if there are none."""
        return max((kind.prompt_tokens + kind.limit_tokens for kind in self.kinds), default=0.0)

    def mean(self, name: str) -> float:
        """Of a field of the kinds, over all rows; 0 if there are none."""
        total = sum(kind.num_rows * getattr(kind, name) for kind in self.kinds)
        return float(total / self.num_rows) if self.num_rows else 0.0

    def has_moved_from(self, before: "QueueShape", *, block_rows: int) -> bool:
        """Whether a mean length, or the number of rows as far as the block notices it, is a quarter
        more or less than it was. An empty queue is no reason to plan.
        """
        if not self.kinds:
            return False
        if not before.kinds:
            return True
        enough = _ENOUGH_BLOCKS * block_rows
        rows = (min(self.num_rows, enough), min(before.num_rows, enough))
        lengths = [
            (self.mean(name), before.mean(name))
            for name in ("prompt_tokens", "shared_tokens", "output_tokens")
        ]
        lengths.append((self.longest_tokens, before.longest_tokens))
        return _differ(*rows, alike_below=1.0) or any(
            _differ(now, then, alike_below=_ONE_PAGE_TOKENS) for now, then in lengths
        )


def _kinds(batch: WaitingBatch) -> list[RowKind]:
    all_lines = sum(group.num_lines for group in batch.groups)
    share = batch.num_open / all_lines
    reached = _reached_share(batch, all_lines)
    return [_kind(group, share=share, reached=reached) for group in batch.groups]


def _kind(group: LineGroup, *, share: float, reached: float) -> RowKind:
    return RowKind(
        num_rows=group.num_lines * share,
        prompt_tokens=group.prompt_tokens / group.num_lines,
        shared_tokens=group.shared_tokens / group.num_lines,
        output_tokens=max(1.0, group.limit_tokens / group.num_lines * reached),
        limit_tokens=group.limit_tokens / group.num_lines,
    )


def _reached_share(batch: WaitingBatch, all_lines: int) -> float:
    """How much of their limits lines are expected to generate, by those that have ended."""
    limit = sum(group.limit_tokens for group in batch.groups) / all_lines
    num_ended = sum(group.num_lines for group in batch.outputs)
    generated = sum(group.output_tokens for group in batch.outputs)
    return min(1.0, (generated + _DOUBT_LINES * limit) / ((num_ended + _DOUBT_LINES) * limit))


def _differ(now: float, then: float, *, alike_below: float) -> bool:
    low, high = sorted((max(now, alike_below), max(then, alike_below)))
    return high > _MOVED * low
