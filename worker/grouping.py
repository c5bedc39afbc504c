"""Rendered lines summed up by like size, with what each shares with the one before; keeps no text."""

from collections.abc import Sequence

from jobs.line_group import Grouping, LineGroup
from worker.render import Rendered


class RenderedGrouping:
    """Takes lines in the order of their file."""

    def __init__(self) -> None:
        self._grouping = Grouping()
        self._last_token_ids: tuple[int, ...] = ()

    def add(self, rendered: Rendered) -> None:
        """A line of several rows counts as one of them, the longest: rows must fit, lines be counted.

        A row that generates nothing takes part in a sweep all the same, as one that generates a token;
        one that is read from its beginning on shares nothing.
        """
        prompt = max(rendered.prompts, key=lambda each: len(each.token_ids))
        sharable = prompt.token_ids if prompt.sharable_token_ids else ()
        self._grouping.add(
            prompt_tokens=len(prompt.token_ids),
            shared_tokens=num_shared(self._last_token_ids, sharable),
            limit_tokens=max(1, prompt.sampling.max_tokens),
        )
        self._last_token_ids = sharable

    def groups(self) -> tuple[LineGroup, ...]:
        return self._grouping.groups()


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with, found by halving: slices are compared without a loop here."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
