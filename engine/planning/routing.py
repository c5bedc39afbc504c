"""How many of a layer's experts a sweep's tokens are likely sent to, and whether it pays to fetch
only those; no tensors.
"""

from typing import Final

_MOST_SHARE: Final = 0.5
"""Of all experts: fetching chosen ones starts after their router ran and hides behind nothing."""


def expected_experts(num_experts: int, num_chosen: float, num_tokens: float) -> float:
    """How many different ones, if every token is sent to `num_chosen` of them at random."""
    missed: float = (1 - min(1.0, num_chosen / num_experts)) ** num_tokens
    return num_experts * (1 - missed)


def fetches_chosen(num_experts: int, num_chosen: int, num_tokens: int) -> bool:
    """Whether a sweep of so many tokens fetches its experts as they are chosen, not all ahead."""
    return expected_experts(num_experts, num_chosen, num_tokens) <= _MOST_SHARE * num_experts
