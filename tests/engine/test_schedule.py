from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.sweep.schedule import pack_micro_batches, steps, with_next

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


@given(num_layers=COUNTS, num_micro_batches=COUNTS)
def test_each_step_comes_with_the_one_to_prepare_for(
    num_layers: int, num_micro_batches: int
) -> None:
    order = list(steps(num_layers, num_micro_batches))
    assert list(with_next(order)) == list(zip(order, [*order[1:], None], strict=True))


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=40)


@given(sizes=SIZES, max_tokens=st.integers(9, 30), max_fetched=st.integers(20, 90))
def test_micro_batches_keep_order_lose_no_segment_and_hold_no_more_than_they_may(
    sizes: list[tuple[int, int]], max_tokens: int, max_fetched: int
) -> None:
    cuts = pack_micro_batches(sizes, limits=(max_tokens, max_fetched))
    assert [index for cut in cuts for index in cut] == list(range(len(sizes)))

    def is_over(indices: range) -> bool:
        tokens, fetched = (sum(sizes[index][at] for index in indices) for at in (0, 1))
        return tokens > max_tokens or fetched > max_fetched

    assert all(len(cut) == 1 or (cut and not is_over(cut)) for cut in cuts)
    for cut, following in pairwise(cuts):
        assert is_over(range(cut.start, following.start + 1)), "a segment would still have fitted"
