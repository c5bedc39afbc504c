"""Whose shards go on the queue, and before whose."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.batch import BatchOptions
from tests.support.box import Box, completion_line
from worker.feed import Feeder
from worker.intake import validate_batch
from worker.reconcile import reconcile

AHEAD = 2


@pytest.fixture
def small(tmp_path: Path, valkey_url: str) -> Iterator[Box]:
    """Two shards of a batch at once, of one line each."""
    box = Box(tmp_path, valkey_url, shards_ahead=AHEAD, shard_lines=1)
    box.redis.flushall()
    yield box
    box.close()


def begin(box: Box, num_lines: int, *, priority: int = 0, within_s: int | None = None) -> str:
    batch_id = box.add(
        [completion_line(index) for index in range(num_lines)],
        ring=False,
        window_s=within_s or 86_400,
        options=BatchOptions(priority=priority, expires_after_s=within_s),
    )
    validate_batch(box.intake_context(), batch_id)
    return batch_id


def queued(box: Box) -> list[tuple[str, int]]:
    """Batch and shard of each job, in the queue's order."""
    parts = [job_id.removeprefix("shard-").rpartition("-") for job_id in box.queue.job_ids]
    return [(batch_id, int(index)) for batch_id, _, index in parts]


def finish(box: Box, feeder: Feeder, batch_id: str, index: int) -> None:
    """As a worker does when a shard is done."""
    box.queue.remove(f"shard-{batch_id}-{index}")
    box.ledger.lines.finish_shards([(batch_id, index)])
    feeder.feed(batch_id)


def test_equals_take_turns(small: Box) -> None:
    first, second = begin(small, 3), begin(small, 3)
    assert queued(small) == [(first, 0), (first, 1), (second, 0), (second, 1)]


def test_a_higher_priority_goes_before_all_that_waits(small: Box) -> None:
    plain = begin(small, 3)
    high, higher, low = (begin(small, 2, priority=priority) for priority in (5, 9, -1))
    order = [(higher, 0), (higher, 1), (high, 0), (high, 1), (plain, 0), (plain, 1)]
    assert queued(small) == order  # `plain` has more to come: `low` waits for that
    feeder = Feeder(small.ledger, small.doorbell, ahead=AHEAD)
    finish(small, feeder, plain, 0)
    assert queued(small)[4:] == [(plain, 1), (plain, 2)]
    feeder.feed(low)
    assert queued(small)[4:] == [(plain, 1), (plain, 2), (low, 0), (low, 1)]


def test_while_the_first_has_more_no_other_goes_on(small: Box) -> None:
    plain = begin(small, 6)
    high = begin(small, 4, priority=1)
    feeder = Feeder(small.ledger, small.doorbell, ahead=AHEAD)
    finish(small, feeder, plain, 0)
    assert queued(small) == [(high, 0), (high, 1), (plain, 1)]
    finish(small, feeder, high, 0)
    assert queued(small) == [(high, 1), (high, 2), (plain, 1)]
    finish(small, feeder, high, 1)
    assert queued(small) == [(high, 2), (high, 3), (plain, 1)]
    feeder.feed(plain)
    assert queued(small) == [(high, 2), (high, 3), (plain, 1), (plain, 2)]


def test_a_hungry_worker_is_given_what_may_go(small: Box) -> None:
    plain = begin(small, 6)
    high = begin(small, 4, priority=1)
    for job_id in small.queue.job_ids:  # all of it was taken
        small.queue.remove(job_id)
    feeder = Feeder(small.ledger, small.doorbell, ahead=AHEAD)
    feeder.feed_all()
    assert queued(small) == []  # both have as much at work as they may
    small.ledger.lines.finish_shards([(plain, 0)])
    feeder.feed_all()
    assert queued(small) == [(plain, 2)]  # of `high` nothing more may go
    small.ledger.lines.finish_shards([(plain, 1), (high, 0)])
    feeder.feed_all()
    assert queued(small) == [(plain, 2), (high, 2)]


def test_an_earlier_deadline_goes_first_and_the_windows_end_is_none(small: Box) -> None:
    plain = begin(small, 1)
    late = begin(small, 1, within_s=7_200)
    soon = begin(small, 1, within_s=3_600)
    high = begin(small, 1, priority=1)
    assert [batch_id for batch_id, _ in queued(small)] == [high, soon, late, plain]
    assert begin(small, 1) == queued(small)[-1][0]


def test_what_is_rung_anew_keeps_the_order(small: Box) -> None:
    plain, high = begin(small, 3), begin(small, 3, priority=1)
    before = queued(small)
    for _ in range(2):
        reconcile(small.ledger, small.doorbell, small.store, shards_ahead=AHEAD)
        assert queued(small) == before
    small.redis.flushall()
    reconcile(small.ledger, small.doorbell, small.store, shards_ahead=AHEAD)
    assert queued(small) == before
    assert before == [(high, 0), (high, 1), (plain, 0), (plain, 1)]


def test_a_batch_of_a_model_that_is_gone_holds_nobody_up(small: Box) -> None:
    gone = begin(small, 4, priority=100)
    context = small.intake_context()
    with small.ledger._database.writing() as connection:
        connection.exec_driver_sql("UPDATE batches SET model = 'other'")
    plain = small.add([completion_line(0)], ring=False)
    validate_batch(context, plain)
    assert (plain, 0) in queued(small)
    assert small.ledger.ranks.waiting() == []
    assert small.batch(gone).model == "other"
