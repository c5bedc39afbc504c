"""The queue's shape: means over what is open, outputs as they are learned, and when it has moved."""

import dataclasses

import pytest

from jobs.line_group import LineGroup, OutputGroup, WaitingBatch
from worker.queue_shape import QueueShape

SHORT = LineGroup(num_lines=300, prompt_tokens=30_000, shared_tokens=6_000, limit_tokens=60_000)
LONG = LineGroup(num_lines=100, prompt_tokens=100_000, shared_tokens=0, limit_tokens=20_000)
BATCH = WaitingBatch(batch_id="b", num_open=200, groups=(SHORT, LONG), outputs=())
SHAPE = QueueShape.of([BATCH])


def test_open_lines_are_as_the_batch_is() -> None:
    assert [kind.num_rows for kind in SHAPE.kinds] == [150, 50]
    assert SHAPE.num_rows == 200
    assert SHAPE.mean("prompt_tokens") == (3 * 100 + 1_000) / 4
    assert SHAPE.mean("shared_tokens") == 3 * 20 / 4
    assert SHAPE.mean("output_tokens") == SHAPE.mean("limit_tokens") == 200


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ((), 200.0),
        ((OutputGroup(num_lines=32, output_tokens=0),), 100.0),
        ((OutputGroup(num_lines=5_000, output_tokens=250_000),), 50.95),
        ((OutputGroup(num_lines=10, output_tokens=10**6),), 200.0),
    ],
)
def test_outputs_are_learned_and_stay_below_the_limit(
    outputs: tuple[OutputGroup, ...], expected: float
) -> None:
    learned = QueueShape.of([dataclasses.replace(BATCH, outputs=outputs)])
    assert learned.mean("output_tokens") == pytest.approx(expected, abs=0.01)
    assert learned.mean("limit_tokens") == 200


def _open(num_open: int) -> QueueShape:
    return QueueShape.of([dataclasses.replace(BATCH, num_open=num_open)])


def test_the_queue_has_moved_when_a_figure_is_a_quarter_off() -> None:
    def moved(now: QueueShape, then: QueueShape, block_rows: int = 64) -> bool:
        return now.has_moved_from(then, block_rows=block_rows)

    assert not moved(SHAPE, SHAPE)
    assert not moved(_open(170), SHAPE)
    assert moved(_open(150), SHAPE)
    assert moved(SHAPE, _open(150))
    assert not moved(_open(20_000), _open(300))
    assert moved(_open(20_000), _open(300), block_rows=256)
    longer = dataclasses.replace(LONG, prompt_tokens=2 * LONG.prompt_tokens)
    assert moved(QueueShape.of([dataclasses.replace(BATCH, groups=(SHORT, longer))]), SHAPE)
    learned = dataclasses.replace(BATCH, outputs=(OutputGroup(num_lines=50, output_tokens=50),))
    assert moved(QueueShape.of([learned]), SHAPE)


def test_an_empty_queue_is_no_reason_to_plan_and_the_first_batch_is() -> None:
    empty = QueueShape.of([])
    assert not empty.has_moved_from(SHAPE, block_rows=64)
    assert not empty.has_moved_from(empty, block_rows=64)
    assert SHAPE.has_moved_from(empty, block_rows=64)
