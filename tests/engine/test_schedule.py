from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sweep.schedule import pack_micro_batches, steps

COUNTS = st.integers(1, 7)


@given(num_layers=COUNTS, num_micro_batches=COUNTS)
def test_a_sweep_visits_each_layer_of_each_micro_batch_once_layer_by_layer(
    num_layers: int, num_micro_batches: int
) -> None:
    visited = [(step.layer, step.micro_batch) for step in steps(num_layers, num_micro_batches)]
    every = [(layer, batch) for layer in range(num_layers) for batch in range(num_micro_batches)]
    assert visited == every


@given(num_layers=COUNTS, num_micro_batches=COUNTS)
def test_a_layers_weights_are_taken_before_its_first_step_and_let_go_after_its_last(
    num_layers: int, num_micro_batches: int
) -> None:
    held: list[int] = []
    log = []
    for step in steps(num_layers, num_micro_batches):
        if step.is_first:
            held.append(step.layer)
            log.append(step.layer)
        assert held == [step.layer]
        if step.is_last:
            held.remove(step.layer)
    assert held == []
    assert log == list(range(num_layers))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    max_tokens=st.integers(9, 30),
)
def test_micro_batches_keep_order_lose_no_segment_and_hold_no_more_than_they_may(
    lengths: list[int], max_tokens: int
) -> None:
    cuts = pack_micro_batches(lengths, max_tokens=max_tokens)
    assert [index for cut in cuts for index in cut] == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in cut) for cut in cuts]
    assert all(0 < total <= max_tokens for total in totals)
    for total, following in pairwise(zip(totals, cuts, strict=True)):
        assert total[0] + lengths[following[1][0]] > max_tokens, "a segment would still have fitted"


def test_a_segment_longer_than_a_micro_batch_is_an_error_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="a segment of 5 tokens in batches of 4"):
        pack_micro_batches([1, 5], max_tokens=4)
