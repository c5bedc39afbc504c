"""From what waits to what a planner is told: whole pages shared, limits kept, room for one more row."""

import pytest

from jobs.line_group import LineGroup, OutputGroup, WaitingBatch
from worker.queue_shape import QueueShape
from worker.workload import workload_of

GROUP = LineGroup(num_lines=100, prompt_tokens=10_000, shared_tokens=4_500, limit_tokens=5_000)


def _queue(group: LineGroup = GROUP, *, outputs: tuple[OutputGroup, ...] = ()) -> QueueShape:
    return QueueShape.of(
        [WaitingBatch(batch_id="b", num_open=40, groups=(group,), outputs=outputs)]
    )


def test_rows_are_as_the_queue_says() -> None:
    found = workload_of(_queue(), longest_tokens=1_000)
    assert found.num_rows == 40
    assert found.mean_prompt_tokens == pytest.approx(100, rel=1e-3)
    assert found.mean_own_tokens == pytest.approx(100 - 32, rel=1e-3)
    assert found.mean_output_tokens == pytest.approx(50, rel=1e-3)
    learned = workload_of(
        _queue(outputs=(OutputGroup(num_lines=32, output_tokens=0),)), longest_tokens=1_000
    )
    assert learned.mean_output_tokens == pytest.approx(25, rel=1e-3)


def test_a_prefix_of_one_page_is_not_shared() -> None:
    short = LineGroup(num_lines=10, prompt_tokens=400, shared_tokens=310, limit_tokens=10)
    assert workload_of(_queue(short), longest_tokens=99).num_kept_once_tokens == 0


def test_there_is_room_for_a_row_that_may_come_and_none_is_longer_than_told() -> None:
    assert workload_of(_queue(), longest_tokens=100_000).longest_tokens == 4096
    assert workload_of(_queue(), longest_tokens=1_000).longest_tokens == 1_000
    for longest_tokens in (2, 60, 120):
        assert workload_of(_queue(), longest_tokens=longest_tokens).longest_tokens == longest_tokens
    long = LineGroup(num_lines=1, prompt_tokens=100, shared_tokens=0, limit_tokens=9_900)
    assert workload_of(_queue(long), longest_tokens=100_000).longest_tokens == 10_000


@pytest.mark.parametrize("longest_tokens", [2, 100, 512, 100_000])
def test_of_an_empty_queue_something_usual_is_taken_that_fits(longest_tokens: int) -> None:
    found = workload_of(QueueShape.of([]), longest_tokens=longest_tokens)
    assert found.longest_tokens == min(longest_tokens, 4096)
    assert found.num_rows == 10_000
    if longest_tokens >= 512:
        assert found.mean_prompt_tokens == pytest.approx(256, rel=1e-3)
