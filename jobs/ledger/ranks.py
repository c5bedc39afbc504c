"""Which of a tenant's batches go before which: by priority, then by a deadline of their own; equals
take turns, as tenants do, whatever they ask.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, exists, select

from jobs.batch import BatchStatus
from jobs.ledger.database import Database
from jobs.ledger.tables import batch_options, batches, models, shards
from jobs.ledger.turns import ShardState

Rank = tuple[int, float]
"""The less, the earlier. A window's end is no deadline: every batch has one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """`is_outranked`: another batch's waiting shards go first. `outranks` are those whose shards on
    the queue wait behind its own.
    """

    is_outranked: bool = False
    outranks: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A batch in progress, of a model that is served: others hold nobody up."""

    batch_id: str
    tenant: str
    rank: Rank
    has_waiting: bool
    has_queued: bool


class RankRecords:
    """Reads one row for each batch in progress, none of their lines."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def standing(self, batch_id: str) -> Standing:
        with self._database.reading() as connection:
            every = _running(connection)
        own = next((each for each in every if each.batch_id == batch_id), None)
        if own is None:
            return Standing()
        mine = own.rank
        running = [each for each in every if each.tenant == own.tenant]
        return Standing(
            is_outranked=any(each.has_waiting and each.rank < mine for each in running),
            outranks=frozenset(
                each.batch_id for each in running if each.has_queued and each.rank > mine
            ),
        )

    def waiting(self) -> list[list[list[str]]]:
        """Batches that have waiting shards: each tenant's, those of one rank together and oldest
        first.
        """
        with self._database.reading() as connection:
            running = [each for each in _running(connection) if each.has_waiting]
        tenants = dict.fromkeys(each.tenant for each in running)
        return [_by_rank([each for each in running if each.tenant == tenant]) for tenant in tenants]


def _by_rank(running: Sequence[_Running]) -> list[list[str]]:
    ordered = sorted(running, key=lambda each: each.rank)
    return [
        [each.batch_id for each in alike]
        for _, alike in itertools.groupby(ordered, key=lambda each: each.rank)
    ]


def rank_of(*, priority: int, deadline_at: float | None) -> Rank:
    return -priority, math.inf if deadline_at is None else deadline_at


def _running(connection: Connection) -> list[_Running]:
    """Oldest first."""
    query = (
        select(
            batches.c.id,
            batches.c.tenant,
            batches.c.expires_at,
            batch_options.c.priority,
            batch_options.c.expires_after_s,
            _has(ShardState.WAITING).label("has_waiting"),
            _has(ShardState.QUEUED).label("has_queued"),
        )
        .join(batch_options, batch_options.c.batch_id == batches.c.id, isouter=True)
        .where(
            batches.c.status == BatchStatus.IN_PROGRESS,
            batches.c.model.in_(select(models.c.id)),
        )
        .order_by(batches.c.seq)
    )
    return [
        _Running(
            batch_id=row.id,
            tenant=row.tenant,
            rank=rank_of(
                priority=row.priority or 0,
                deadline_at=row.expires_at if row.expires_after_s is not None else None,
            ),
            has_waiting=bool(row.has_waiting),
            has_queued=bool(row.has_queued),
        )
        for row in connection.execute(query).all()
    ]


def _has(state: ShardState) -> ColumnElement[Any]:
    return exists().where(shards.c.batch_id == batches.c.id, shards.c.state == state)
