"""What a shard costs the ledger does not grow with its batch, nor what a poll costs with its lines.

Counted in steps of SQLite's own machine, which no other load on this one changes.
"""

import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from jobs.ledger.database import Database
from jobs.ledger.ledger import Ledger
from jobs.line import Outcome, ResultRecord
from tests.support.records import batch_record, line_records

_SHARD_LINES = 4
_STEPS_PER_CALL = 10
SIZES = (200, 6_000)


class Steps:
    """Tens of steps since it was asked last; of one connection, which one thread always gets."""

    def __init__(self, database: Database) -> None:
        with database.reading() as connection:
            driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        self._count = 0
        driver.set_progress_handler(self._note, _STEPS_PER_CALL)

    def _note(self) -> int:
        self._count += 1
        return 0  # go on

    def of(self, work: Callable[[], object]) -> int:
        before = self._count
        work()
        return self._count - before


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield database
    database.close()


def begun(ledger: Ledger, num_lines: int) -> str:
    batch = batch_record()
    ledger.batches.add(batch)
    found = line_records(num_lines, shard_lines=_SHARD_LINES)
    assert ledger.lines.begin(batch.id, model="m", found=found, refused=[])
    return batch.id


def half_done(ledger: Ledger, num_lines: int) -> str:
    """A batch whose first half is settled, its shards done, with the next shards on the queue."""
    batch_id = begun(ledger, num_lines)
    half = num_lines // 2
    ledger.lines.record([result(batch_id, index) for index in range(half)])
    ledger.lines.finish_shards([(batch_id, index) for index in range(half // _SHARD_LINES)])
    ledger.lines.queue_shards(batch_id, ahead=8)
    return batch_id


def result(batch_id: str, index: int) -> ResultRecord:
    return ResultRecord(
        batch_id=batch_id,
        line_index=index,
        outcome=Outcome.COMPLETED,
        row="x" * 500,
        input_tokens=index % 7,
        output_tokens=1,
    )


def next_shard(num_lines: int) -> int:
    return num_lines // 2 // _SHARD_LINES


DEEDS: dict[str, Callable[[Ledger, str, int], object]] = {
    "unsettled": lambda ledger, id_, num: ledger.lines.unsettled(id_, next_shard(num)),
    "record": lambda ledger, id_, num: ledger.lines.record([result(id_, num // 2)]),
    "finish_shards": lambda ledger, id_, num: ledger.lines.finish_shards([(id_, next_shard(num))]),
    "queue_shards": lambda ledger, id_, num: ledger.lines.queue_shards(id_, ahead=10),
    "waiting": lambda ledger, id_, num: ledger.ranks.waiting(),
    "standing": lambda ledger, id_, num: ledger.ranks.standing(id_),
    "statuses": lambda ledger, id_, num: ledger.batches.statuses([id_]),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_the_steps_of_a_shard_do_not_grow_with_its_batch(database: Database, deed: str) -> None:
    ledger, steps = Ledger(database), Steps(database)
    batch_ids = {num_lines: half_done(ledger, num_lines) for num_lines in SIZES}
    small, large = (
        steps.of(partial(DEEDS[deed], ledger, batch_ids[num_lines], num_lines))
        for num_lines in SIZES
    )
    assert large <= small + 20


def test_settling_the_rest_looks_at_each_line_once(database: Database) -> None:
    ledger, steps = Ledger(database), Steps(database)
    batch_ids = {num_lines: half_done(ledger, num_lines) for num_lines in SIZES}
    small, large = (
        steps.of(partial(ledger.lines.settle_rest, batch_id, Outcome.CANCELLED)) / num_lines
        for num_lines, batch_id in batch_ids.items()
    )
    assert all(ledger.lines.is_settled(batch_id) for batch_id in batch_ids.values())
    assert large <= 1.1 * small


def test_the_total_of_a_batch_is_read_off_its_last_line(database: Database) -> None:
    ledger, steps = Ledger(database), Steps(database)
    batch_ids = {num_lines: begun(ledger, num_lines) for num_lines in SIZES}
    for num_lines, batch_id in batch_ids.items():
        assert ledger.batches.get(batch_id).request_counts.total == num_lines
    small, large = (
        steps.of(partial(ledger.batches.get, batch_id)) for batch_id in batch_ids.values()
    )
    assert large <= small + 20
