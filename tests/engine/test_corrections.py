"""Corrections: slow, bounded, and of those terms alone that a run tells something about."""

import dataclasses

import pytest

from engine.planning.corrections import Correction, Corrections

NONE = Corrections(measured_at="then")


def test_one_run_takes_a_factor_a_quarter_of_the_way() -> None:
    learned = NONE.learned({"disk": 1.0, "gemm": 2.0, "head": 1.0}, {"disk": 1.5, "gemm": 1.0})
    assert learned.factor("disk") == pytest.approx(1.5**0.25)
    assert learned.factor("gemm") == pytest.approx(0.5**0.25)
    assert [each.num_runs for each in learned.terms.values()] == [1, 1]
    assert learned.factor("head") == 1.0
    assert learned.measured_at == "then"


def test_runs_that_always_take_so_much_longer_are_met_in_the_end() -> None:
    learned = NONE
    for _ in range(40):
        learned = learned.learned({"disk": 3.0 * learned.factor("disk")}, {"disk": 4.0})
    assert learned.factor("disk") == pytest.approx(4 / 3, rel=1e-3)
    assert learned.terms["disk"].num_runs == 40


@pytest.mark.parametrize(("measured_s", "bound"), [(1e6, 2.0), (1e-6, 0.5)])
def test_no_run_moves_a_factor_beyond_its_bounds(measured_s: float, bound: float) -> None:
    assert NONE.learned({"disk": 1.0}, {"disk": measured_s}).factor("disk") == bound


def test_what_was_not_there_teaches_nothing() -> None:
    known = dataclasses.replace(NONE, terms={"disk": Correction(factor=1.25, num_runs=3)})
    assert known.learned({"disk": 0.0, "gemm": 1.0}, {"disk": 2.0, "gemm": 0.0}) == known
