"""Shards go on the queue in turns: of tenants, of their batches, and within a key's limit of lines."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.ledger.ledger import Ledger
from jobs.line import Outcome, ResultRecord
from jobs.tenant import Caller, Limits
from tests.support.records import batch_record, line_records

SHARD = 4


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def add(
    ledger: Ledger, tenant: str, *, num_shards: int = 20, model: str = "m", limit: int | None = None
) -> str:
    """A batch in progress with shards of `SHARD` lines."""
    now = int(time.time())
    batch = batch_record(created_at=now, expires_at=now + 86_400)
    caller = Caller(tenant=tenant, limits=Limits(enqueued_lines=limit))
    assert ledger.seen_by(caller).batches.add(batch)
    found = line_records(SHARD * num_shards, shard_lines=SHARD)
    assert ledger.lines.begin(batch.id, model=model, found=found, refused=[])
    return batch.id


def settle_lines(ledger: Ledger, batch_id: str, shard_index: int, outcome: Outcome) -> None:
    """One after the other; their shard is not told."""
    for line in ledger.lines.unsettled(batch_id, shard_index):
        row = ResultRecord(
            batch_id=batch_id,
            line_index=line.index,
            outcome=outcome,
            row="{}",
            input_tokens=1,
            cached_tokens=0,
            output_tokens=1,
        )
        ledger.lines.record([row])


def settle(ledger: Ledger, batch_id: str, shard_index: int) -> None:
    settle_lines(ledger, batch_id, shard_index, Outcome.COMPLETED)
    ledger.lines.finish_shards([(batch_id, shard_index)])


def num_queued(ledger: Ledger, *batch_ids: str) -> list[int]:
    return [len(ledger.lines.queued_shards(batch_id)) for batch_id in batch_ids]


def feed(ledger: Ledger, *batch_ids: str, ahead: int = 8) -> list[int]:
    for batch_id in batch_ids:
        ledger.lines.queue_shards(batch_id, ahead=ahead)
    return num_queued(ledger, *batch_ids)


def test_batches_of_one_tenant_each_have_all_of_the_turn(ledger: Ledger) -> None:
    made = [add(ledger, "one") for _ in range(3)]
    assert feed(ledger, *made) == [8, 8, 8]


def test_a_tenant_with_many_batches_has_no_more_on_the_queue_than_one_with_one(
    ledger: Ledger,
) -> None:
    many = [add(ledger, "many") for _ in range(4)]
    one = add(ledger, "one")
    assert feed(ledger, *many, one) == [2, 2, 2, 2, 8]


def test_every_batch_moves_however_many_its_tenant_has(ledger: Ledger) -> None:
    many = [add(ledger, "many") for _ in range(12)]
    one = add(ledger, "one")
    assert feed(ledger, *many, one) == [1] * 12 + [8]


def test_what_is_on_the_queue_stays_and_is_made_good_by_waiting(ledger: Ledger) -> None:
    first, second = add(ledger, "many"), add(ledger, "many")
    assert feed(ledger, first, second) == [8, 8]
    other = add(ledger, "other")
    assert feed(ledger, first, second, other) == [8, 8, 8]
    for index in range(5):
        settle(ledger, first, index)
    assert feed(ledger, first, second, other) == [4, 8, 8]


def test_batches_of_a_model_that_is_not_served_take_nobodys_turn(ledger: Ledger) -> None:
    for _ in range(3):
        add(ledger, "one", model="another")
    mine = add(ledger, "one")
    add(ledger, "other", model="another")
    assert feed(ledger, mine) == [8]
    other = add(ledger, "other")
    assert feed(ledger, mine, other) == [8, 8]


def test_lines_over_the_limit_wait_and_none_fails(ledger: Ledger) -> None:
    first, second = (add(ledger, "one", limit=2 * SHARD) for _ in range(2))
    other = add(ledger, "other", limit=2 * SHARD)
    assert feed(ledger, first, second, other) == [2, 0, 2]
    settle(ledger, first, 0)
    assert feed(ledger, second, first, other) == [1, 1, 2]
    settled = 0
    while any(num_queued(ledger, first, second)):
        for batch_id in (second, first):
            for index in ledger.lines.queued_shards(batch_id):
                settle(ledger, batch_id, index)
                settled += 1
        assert sum(feed(ledger, first, second)) <= 2
    assert settled == 2 * 20 - 1
    assert ledger.lines.is_settled(first)
    assert ledger.lines.is_settled(second)


def test_a_limit_below_one_shard_lets_one_go_at_a_time(ledger: Ledger) -> None:
    made = add(ledger, "one", limit=1, num_shards=3)
    for index in range(3):
        assert ledger.lines.queue_shards(made, ahead=8) == [index]
        assert ledger.lines.queue_shards(made, ahead=8) == []
        settle(ledger, made, index)


def test_lines_that_are_done_make_room_before_their_shard_is(ledger: Ledger) -> None:
    made = add(ledger, "one", limit=2 * SHARD)
    assert ledger.lines.queue_shards(made, ahead=8) == [0, 1]
    settle_lines(ledger, made, 0, Outcome.FAILED)
    assert ledger.lines.queue_shards(made, ahead=8) == [2]


def test_an_unknown_batch_has_no_shards(ledger: Ledger) -> None:
    assert ledger.lines.queue_shards("batch_none", ahead=8) == []
