"""What a shard is suspected of, death by death."""

import pytest

from worker.deaths import Suspicion


def _after(*num_lines: int) -> Suspicion:
    suspicion = Suspicion()
    for num in num_lines:
        suspicion = suspicion.after_death(num)
    return suspicion


def test_two_deaths_change_nothing() -> None:
    assert _after(8, 8).at_once is None


@pytest.mark.parametrize(
    ("num_lines", "tried"),
    [
        ([8, 8, 8], 8),
        ([8, 8, 8, 8], 4),
        ([8, 8, 8, 8, 4], 2),  # four lines did no harm
        ([8, 8, 8, 8, 4, 3], 1),
        ([8, 8, 8, 8, 4, 3, 3], 1),
        ([1, 1, 1], 1),
    ],
)
def test_a_suspect_shard_runs_by_halves(num_lines: list[int], tried: int) -> None:
    suspicion = _after(*num_lines)
    assert (suspicion.at_once, suspicion.is_proven) == (tried, False)


@pytest.mark.parametrize("num_lines", [[8, 8, 8, 8, 4, 3, 3, 3], [1, 1, 1, 1, 1]])
def test_a_line_is_to_blame_that_died_alone_twice(num_lines: list[int]) -> None:
    assert _after(*num_lines).is_proven


def test_few_lines_need_few_deaths() -> None:
    assert Suspicion(at_once=32).after_death(1) == Suspicion(at_once=1, num_deaths=1)
