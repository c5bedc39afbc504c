"""Which shards of a batch may go on the queue now: tenants take turns, and a tenant's batches in its."""

import enum
import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, and_, exists, func, select

from jobs.batch import BatchStatus
from jobs.ledger.tables import batches, lines, results, shards


class ShardState(enum.StrEnum):
    WAITING = "waiting"  # cut, not on the queue
    QUEUED = "queued"  # a doorbell was rung for it, or is about to be
    DONE = "done"  # every line of it has a result


def next_shards(connection: Connection, batch_id: str, *, ahead: int) -> list[int]:
    """The next waiting ones, so that at most the batch's part of `ahead` is queued. Where several
    tenants have shards waiting, each has `ahead` for all its batches, and these share it evenly.
    """
    batch = connection.execute(select(batches).where(batches.c.id == batch_id)).one_or_none()
    if batch is None:
        return []
    queued = connection.execute(
        select(func.count())
        .select_from(shards)
        .where(shards.c.batch_id == batch_id, shards.c.state == ShardState.QUEUED)
    ).scalar_one()
    query = (
        select(shards.c.shard_index)
        .where(shards.c.batch_id == batch_id, shards.c.state == ShardState.WAITING)
        .order_by(shards.c.shard_index)
        .limit(max(0, _part_of(connection, batch, ahead) - queued))
    )
    chosen = list(connection.execute(query).scalars())
    if not chosen or batch.max_enqueued_lines is None:
        return chosen
    return _within_limit(connection, batch, chosen)


def _part_of(connection: Connection, batch: Row[Any], ahead: int) -> int:
    """At least one shard: a tenant with more batches than `ahead` is still ahead of the others."""
    is_waiting = exists().where(
        shards.c.batch_id == batches.c.id, shards.c.state == ShardState.WAITING
    )
    query = (
        select(batches.c.tenant, func.count().label("num_batches"))
        .where(
            batches.c.status == BatchStatus.IN_PROGRESS, batches.c.model == batch.model, is_waiting
        )
        .group_by(batches.c.tenant)
    )
    rows = connection.execute(query).all()
    num_waiting: dict[str, int] = {row.tenant: row.num_batches for row in rows}
    if len(num_waiting) < 2:
        return ahead
    return math.ceil(ahead / num_waiting.get(batch.tenant, 1))


def _within_limit(connection: Connection, batch: Row[Any], chosen: Sequence[int]) -> list[int]:
    """As many as the tenant's enqueued lines leave room for; one where none is enqueued."""
    is_open = ~exists().where(
        results.c.batch_id == lines.c.batch_id, results.c.line_index == lines.c.line_index
    )
    is_its_shard = and_(
        shards.c.batch_id == lines.c.batch_id, shards.c.shard_index == lines.c.shard_index
    )
    enqueued = connection.execute(
        select(func.count())
        .select_from(batches)
        .join(shards, shards.c.batch_id == batches.c.id)
        .join(lines, is_its_shard)
        .where(
            batches.c.tenant == batch.tenant,
            batches.c.model == batch.model,
            batches.c.status == BatchStatus.IN_PROGRESS,
            shards.c.state == ShardState.QUEUED,
            is_open,
        )
    ).scalar_one()
    sizes = connection.execute(
        select(lines.c.shard_index, func.count().label("num_lines"))
        .where(lines.c.batch_id == batch.id, lines.c.shard_index.in_(chosen), is_open)
        .group_by(lines.c.shard_index)
    ).all()
    num_lines = {row.shard_index: row.num_lines for row in sizes}
    taken: list[int] = []
    for index in chosen:
        would_be = enqueued + num_lines.get(index, 0)
        if would_be > batch.max_enqueued_lines and enqueued > 0:
            break
        taken.append(index)
        enqueued = would_be
    return taken
