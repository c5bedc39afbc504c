"""The ledger's webhooks to be sent: rows that come with a batch's end and go once it was told."""

import time
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, insert, select, update

from jobs.batch import BatchStatus
from jobs.ledger.database import Database
from jobs.ledger.options import read_options
from jobs.ledger.tables import webhook_deliveries
from jobs.webhook import Delivery, Listener


class DeliveryRecords:
    """At least once: an attempt is noted before it is made, and a row stays until one succeeded."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def due(self, *, limit: int) -> list[Delivery]:
        """Those that have waited longest for their next attempt."""
        table = webhook_deliveries
        query = select(table).where(table.c.due_at <= time.time()).order_by(table.c.due_at)
        with self._database.reading() as connection:
            rows = connection.execute(query.limit(limit)).all()
            return [_delivery(connection, row) for row in rows]

    def begin_try(self, delivery: Delivery, *, next_at: float) -> bool:
        """Count an attempt and put the next one off; False if somebody else has done so."""
        tried = delivery.num_tries
        with self._database.writing() as connection:
            moved = connection.execute(
                update(webhook_deliveries)
                .where(_is(delivery), webhook_deliveries.c.num_tries == tried)
                .values(num_tries=tried + 1, due_at=next_at)
            )
        return moved.rowcount == 1

    def end(self, delivery: Delivery) -> None:
        """Told, or never to be."""
        with self._database.writing() as connection:
            connection.execute(delete(webhook_deliveries).where(_is(delivery)))


def note_end(connection: Connection, batch_id: str, status: BatchStatus, *, at: int) -> None:
    """In the transaction that ends the batch: who is to be told. Whether the installation has
    somebody who wants to know is for the sender to say.
    """
    assert status.is_final
    listeners = [Listener.INSTALLATION]
    if read_options(connection, batch_id).webhook is not None:
        listeners.append(Listener.BATCH)
    rows = [
        {
            "batch_id": batch_id,
            "listener": listener,
            "event": f"batch.{status}",
            "created_at": at,
            "due_at": at,
            "num_tries": 0,
        }
        for listener in listeners
    ]
    connection.execute(insert(webhook_deliveries), rows)


def _is(delivery: Delivery) -> ColumnElement[bool]:
    return and_(
        webhook_deliveries.c.batch_id == delivery.batch_id,
        webhook_deliveries.c.listener == delivery.listener,
    )


def _delivery(connection: Connection, row: Row[Any]) -> Delivery:
    listener = Listener(row.listener)
    hook = read_options(connection, row.batch_id).webhook
    return Delivery(
        batch_id=row.batch_id,
        listener=listener,
        event=row.event,
        created_at=row.created_at,
        due_at=row.due_at,
        num_tries=row.num_tries,
        webhook=hook if listener is Listener.BATCH else None,
    )
