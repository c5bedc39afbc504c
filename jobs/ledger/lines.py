"""The ledger's lines, shards and results: written once each, the first result of a line wins."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, exists, insert, select, true, update

from jobs.batch import BatchStatus
from jobs.ledger.batches import advance_batch
from jobs.ledger.database import Database
from jobs.ledger.groups import insert_groups
from jobs.ledger.tables import lines, results, shards
from jobs.ledger.turns import ShardState, next_shards
from jobs.line import LineRecord, Outcome, ResultRecord, unrun_result
from jobs.line_group import LineGroup

_INSERT_ROWS = 2_000
_READ_ROWS = 500
_TURNS = "turns"


class LineRecords:
    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(
        self,
        batch_id: str,
        *,
        model: str,
        found: Iterable[LineRecord],
        refused: Iterable[ResultRecord],
        groups: Sequence[LineGroup] = (),
    ) -> bool:
        """In one transaction: the lines, their shards, `groups` of those that can run, results of
        those that cannot, and `validating` to `in_progress`. False, and nothing written, if the batch moved meanwhile.
        """
        with self._database.writing() as connection:
            to = BatchStatus.IN_PROGRESS
            if not advance_batch(connection, batch_id, to, model=model, owned=true()):
                return False
            num_shards = 0
            for part in _parts(found):
                rows = [{"batch_id": batch_id, **line.as_row()} for line in part]
                connection.execute(insert(lines), rows)
                num_shards = part[-1].shard_index + 1
            self._insert_results(connection, refused)
            insert_groups(connection, batch_id, groups)
            if num_shards:
                connection.execute(
                    insert(shards),
                    [
                        {"batch_id": batch_id, "shard_index": index, "state": ShardState.WAITING}
                        for index in range(num_shards)
                    ],
                )
            return True

    def queue_shards(self, batch_id: str, *, ahead: int) -> list[int]:
        """Mark the shards whose turn it is as queued (`jobs.ledger.turns`); their indices."""
        with self._database.writing(alone=_TURNS) as connection:
            chosen = next_shards(connection, batch_id, ahead=ahead)
            if chosen:
                connection.execute(
                    update(shards)
                    .where(shards.c.batch_id == batch_id, shards.c.shard_index.in_(chosen))
                    .values(state=ShardState.QUEUED)
                )
        return chosen

    def queued_shards(self, batch_id: str) -> list[int]:
        query = select(shards.c.shard_index).where(
            shards.c.batch_id == batch_id, shards.c.state == ShardState.QUEUED
        )
        with self._database.reading() as connection:
            return list(connection.execute(query.order_by(shards.c.shard_index)).scalars())

    def unsettled(self, batch_id: str, shard_index: int) -> list[LineRecord]:
        """The shard's lines that have no result yet, in input order."""
        query = (
            select(lines)
            .where(lines.c.batch_id == batch_id, lines.c.shard_index == shard_index, _unsettled())
            .order_by(lines.c.line_index)
        )
        with self._database.reading() as connection:
            return [_line(row) for row in connection.execute(query).all()]

    def record(self, found: Sequence[ResultRecord]) -> None:
        """Commit results, durably, before anyone counts them. A line's first result stays."""
        with self._database.writing() as connection:
            self._insert_results(connection, found)

    def finish_shards(self, keys: Collection[tuple[str, int]]) -> set[str]:
        """Mark shards done, (batch, index) each, in one transaction; the batches settled by that."""
        indices: dict[str, list[int]] = {}
        for batch_id, index in keys:
            indices.setdefault(batch_id, []).append(index)
        if not indices:
            return set()
        with self._database.writing() as connection:
            for batch_id, mine in indices.items():
                connection.execute(
                    update(shards)
                    .where(shards.c.batch_id == batch_id, shards.c.shard_index.in_(mine))
                    .values(state=ShardState.DONE)
                )
            return {batch_id for batch_id in indices if _is_done(connection, batch_id)}

    def is_settled(self, batch_id: str) -> bool:
        """Whether every line of the batch has a result."""
        query = select(lines.c.line_index).where(lines.c.batch_id == batch_id, _unsettled())
        with self._database.reading() as connection:
            return connection.execute(query.limit(1)).one_or_none() is None

    def settle_rest(self, batch_id: str, outcome: Outcome) -> None:
        """Give every line without a result the `outcome` of one that never ran."""
        query = (
            select(lines)
            .where(lines.c.batch_id == batch_id, _unsettled())
            .order_by(lines.c.line_index)
            .limit(_INSERT_ROWS)
        )
        while True:
            with self._database.writing() as connection:
                rest = [_line(row) for row in connection.execute(query).all()]
                if not rest:
                    return
                settled = [unrun_result(batch_id, line, outcome) for line in rest]
                self._insert_results(connection, settled)

    def unfinished(self, batch_id: str) -> Iterator[LineRecord]:
        """Lines whose result is no success, in input order, a few hundred held at a time."""
        last = -1
        is_its_line = and_(
            results.c.batch_id == lines.c.batch_id, results.c.line_index == lines.c.line_index
        )
        while True:
            query = (
                select(lines)
                .join(results, is_its_line)
                .where(
                    lines.c.batch_id == batch_id,
                    lines.c.line_index > last,
                    results.c.outcome != Outcome.COMPLETED,
                )
                .order_by(lines.c.line_index)
                .limit(_READ_ROWS)
            )
            with self._database.reading() as connection:
                found = [_line(row) for row in connection.execute(query).all()]
            if not found:
                return
            last = found[-1].index
            yield from found

    def recorded(self, batch_id: str, *, first: int) -> Iterator[str]:
        """Result rows (JSON text) of any outcome in input order, from the line of that index up to
        the first that has none yet.
        """
        following = first
        while True:
            query = (
                select(results.c.line_index, results.c.row)
                .where(results.c.batch_id == batch_id, results.c.line_index >= following)
                .order_by(results.c.line_index)
                .limit(_READ_ROWS)
            )
            with self._database.reading() as connection:
                found = connection.execute(query).all()
            for row in found:
                if row.line_index != following:
                    return
                yield row.row
                following += 1
            if not found:
                return

    def rows(self, batch_id: str, outcomes: Iterable[Outcome]) -> Iterator[str]:
        """Result rows (JSON text) of those outcomes in input order, a few hundred held at a time."""
        last = -1
        wanted = list(outcomes)
        while True:
            query = (
                select(results.c.line_index, results.c.row)
                .where(
                    results.c.batch_id == batch_id,
                    results.c.line_index > last,
                    results.c.outcome.in_(wanted),
                )
                .order_by(results.c.line_index)
                .limit(_READ_ROWS)
            )
            with self._database.reading() as connection:
                found = connection.execute(query).all()
            if not found:
                return
            last = found[-1].line_index
            yield from (row.row for row in found)

    def _insert_results(self, connection: Connection, found: Iterable[ResultRecord]) -> None:
        statement = self._database.insert_or_ignore(results)
        for part in _parts(found):
            connection.execute(statement, [result.as_row() for result in part])


def _is_done(connection: Connection, batch_id: str) -> bool:
    rest = select(shards.c.shard_index).where(
        shards.c.batch_id == batch_id, shards.c.state != ShardState.DONE
    )
    return connection.execute(rest.limit(1)).one_or_none() is None


def _unsettled() -> ColumnElement[bool]:
    return ~exists().where(
        and_(results.c.batch_id == lines.c.batch_id, results.c.line_index == lines.c.line_index)
    )


def _parts(found: Iterable[Any]) -> Iterator[list[Any]]:
    part: list[Any] = []
    for item in found:
        part.append(item)
        if len(part) == _INSERT_ROWS:
            yield part
            part = []
    if part:
        yield part


def _line(row: Row[Any]) -> LineRecord:
    return LineRecord(
        index=row.line_index,
        custom_id=row.custom_id,
        offset_bytes=row.offset_bytes,
        num_bytes=row.num_bytes,
        num_prompt_tokens=row.num_prompt_tokens,
        shard_index=row.shard_index,
    )
