"""What waits, summed up: groups of lines of like size, and how long answers turned out so far."""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, func, insert, select

from jobs.batch import BatchStatus
from jobs.ledger.database import Database
from jobs.ledger.tables import batches, line_groups, lines, results
from jobs.line import Outcome
from jobs.line_group import LineGroup, OutputGroup, WaitingBatch

_OUTPUT_GROUPS: Final = 64


class GroupRecords:
    """Reads some hundred rows of a batch at most, whatever its size."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def waiting(self, model_id: str) -> list[WaitingBatch]:
        """The model's batches in progress that have open lines, oldest first."""
        query = (
            select(batches.c.id)
            .where(batches.c.status == BatchStatus.IN_PROGRESS, batches.c.model == model_id)
            .order_by(batches.c.seq)
        )
        with self._database.reading() as connection:
            ids = list(connection.execute(query).scalars())
            found = [_waiting(connection, batch_id) for batch_id in ids]
        return [batch for batch in found if batch.num_open and batch.groups]

    def of(self, batch_id: str) -> tuple[LineGroup, ...]:
        """All its lines that can run, summed up; none while it is validated."""
        with self._database.reading() as connection:
            return _groups(connection, batch_id)


def insert_groups(connection: Connection, batch_id: str, groups: Sequence[LineGroup]) -> None:
    if groups:
        rows = [
            {
                "batch_id": batch_id,
                "group_index": index,
                "num_lines": group.num_lines,
                "prompt_tokens": group.prompt_tokens,
                "shared_tokens": group.shared_tokens,
                "limit_tokens": group.limit_tokens,
            }
            for index, group in enumerate(groups)
        ]
        connection.execute(insert(line_groups), rows)


def _waiting(connection: Connection, batch_id: str) -> WaitingBatch:
    total, settled = (
        connection.execute(
            select(func.count()).select_from(table).where(table.c.batch_id == batch_id)
        ).scalar_one()
        for table in (lines, results)
    )
    return WaitingBatch(
        batch_id=batch_id,
        num_open=total - settled,
        groups=_groups(connection, batch_id),
        outputs=_outputs(connection, batch_id),
    )


def _groups(connection: Connection, batch_id: str) -> tuple[LineGroup, ...]:
    query = select(line_groups).where(line_groups.c.batch_id == batch_id)
    return tuple(
        LineGroup(
            num_lines=row.num_lines,
            prompt_tokens=row.prompt_tokens,
            shared_tokens=row.shared_tokens,
            limit_tokens=row.limit_tokens,
        )
        for row in connection.execute(query.order_by(line_groups.c.group_index)).all()
    )


def _outputs(connection: Connection, batch_id: str) -> tuple[OutputGroup, ...]:
    """Of its completed lines, shortest first."""
    done = (results.c.batch_id == batch_id, results.c.outcome == Outcome.COMPLETED)
    most = connection.execute(select(func.max(results.c.output_tokens)).where(*done)).scalar()
    if most is None:
        return ()
    group = results.c.output_tokens // (most // _OUTPUT_GROUPS + 1)
    query = (
        select(
            func.count().label("num_lines"),
            func.sum(results.c.output_tokens).label("output_tokens"),
        )
        .where(*done)
        .group_by(group)
        .order_by(group)
    )
    return tuple(
        OutputGroup(num_lines=row.num_lines, output_tokens=int(row.output_tokens))
        for row in connection.execute(query).all()
    )
