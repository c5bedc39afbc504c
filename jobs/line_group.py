"""Lines of like size, summed up: what a plan needs to know of a batch, however many lines it has."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Final

MAX_GROUPS: Final = 256
_FINEST: Final = 8
"""Steps of an octave that sizes are told apart by at first."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LineGroup:
    """`num_lines` lines and the sums of what they ask for.

    `shared_tokens` are those that a prompt begins with and the line's neighbour before it too;
    `limit_tokens` the most that may be generated.
    """

    num_lines: int
    prompt_tokens: int
    shared_tokens: int
    limit_tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputGroup:
    """`num_lines` completed lines of like length, and the tokens they came to."""

    num_lines: int
    output_tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WaitingBatch:
    """A batch in progress: `groups` of all its lines, of which `num_open` have no result yet."""

    batch_id: str
    num_open: int
    groups: tuple[LineGroup, ...]
    outputs: tuple[OutputGroup, ...]


class Grouping:
    """Takes lines one by one, and keeps sums only."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], LineGroup] = {}

    def add(self, *, prompt_tokens: int, shared_tokens: int, limit_tokens: int) -> None:
        line = LineGroup(
            num_lines=1,
            prompt_tokens=prompt_tokens,
            shared_tokens=shared_tokens,
            limit_tokens=limit_tokens,
        )
        key = (_size(prompt_tokens, _FINEST), _size(limit_tokens, _FINEST))
        found = self._groups.get(key)
        self._groups[key] = line if found is None else _sum([found, line])

    def groups(self) -> tuple[LineGroup, ...]:
        """At most `MAX_GROUPS`, told apart as finely as that allows; sums are exact."""
        groups: Sequence[LineGroup] = list(self._groups.values())
        steps = _FINEST
        while len(groups) > MAX_GROUPS and steps:
            steps //= 2
            groups = _merged(groups, steps)
        return tuple(groups)


def _merged(groups: Iterable[LineGroup], steps: int) -> list[LineGroup]:
    """By the size of their mean line; of all limits alike if not one step is left."""
    by_size: dict[tuple[int, int], list[LineGroup]] = {}
    for group in groups:
        prompt = _size(group.prompt_tokens // group.num_lines, steps or 1)
        limit = _size(group.limit_tokens // group.num_lines, steps) if steps else 0
        by_size.setdefault((prompt, limit), []).append(group)
    return [_sum(alike) for alike in by_size.values()]


def _sum(groups: Sequence[LineGroup]) -> LineGroup:
    return LineGroup(
        **{
            field.name: sum(getattr(group, field.name) for group in groups)
            for field in dataclasses.fields(LineGroup)
        }
    )


def _size(num_tokens: int, steps: int) -> int:
    """Like the logarithm, in so many steps an octave, exact below that many tokens."""
    octave = max(0, num_tokens.bit_length() - steps.bit_length())
    return octave * steps + (num_tokens >> octave)
