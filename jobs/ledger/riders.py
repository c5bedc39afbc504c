"""The ledger's riders: kept while somebody waits, answered once, then gone with their bodies."""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, bindparam, delete, insert, select, update

from jobs.batch import Endpoint
from jobs.ledger.database import Database
from jobs.ledger.tables import riders
from jobs.rider import Rider, RiderAnswer


class RiderRecords:
    def __init__(self, database: Database) -> None:
        self._database = database

    def exchange(
        self,
        server_id: str,
        *,
        arrived: Mapping[str, Sequence[Rider]],
        left: Collection[str] = (),
    ) -> list[RiderAnswer]:
        """Record the riders of each party, remove those that left, and look for all answers to this
        server's riders: one transaction, which writes only if there is something to write.
        """
        if not arrived and not left:
            with self._database.reading() as connection:
                return _answers(connection, server_id)
        with self._database.writing() as connection:
            _remove(connection, left)
            rows = [
                _row(rider, server_id=server_id, party_id=party_id)
                for party_id, party in arrived.items()
                for rider in party
            ]
            if rows:
                connection.execute(insert(riders), rows)
            return _answers(connection, server_id)

    def waiting(self, party_id: str) -> list[Rider]:
        """The party's riders that somebody still waits for, in order of arrival."""
        query = select(riders).where(riders.c.party_id == party_id, _is_open())
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(riders.c.seq)).all()
        return [_rider(row) for row in rows]

    def still_waiting(self, party_ids: Collection[str]) -> set[str]:
        """Ids of those of the parties' riders that somebody waits for, in one look."""
        query = select(riders.c.id).where(riders.c.party_id.in_(party_ids), _is_open())
        with self._database.reading() as connection:
            return set(connection.execute(query).scalars())

    def parties(self) -> list[str]:
        """Those that have riders without an answer, oldest first."""
        query = select(riders.c.party_id).where(_is_open()).order_by(riders.c.seq)
        with self._database.reading() as connection:
            return list(dict.fromkeys(connection.execute(query).scalars()))

    def answer(self, found: Sequence[RiderAnswer]) -> None:
        """Commit answers, durably; a rider's first one stays. What was asked is forgotten."""
        statement = (
            update(riders)
            .where(riders.c.id == bindparam("rider_id"), riders.c.status_code.is_(None))
            .values(body="", status_code=bindparam("status"), answer=bindparam("text"))
        )
        rows = [
            {"rider_id": each.rider_id, "status": each.status_code, "text": each.body}
            for each in found
        ]
        if rows:
            with self._database.writing() as connection:
                connection.execute(statement, rows)

    def remove_all_of(self, server_id: str) -> None:
        """The server stops: nobody waits for its riders any more."""
        with self._database.writing() as connection:
            connection.execute(delete(riders).where(riders.c.server_id == server_id))

    def remove_expired(self, *, grace_s: float) -> int:
        """What servers left behind that died, so long after its time; how many."""
        overdue = riders.c.expires_at <= time.time() - grace_s
        with self._database.reading() as connection:
            if connection.execute(select(riders.c.seq).where(overdue).limit(1)).first() is None:
                return 0
        with self._database.writing() as connection:
            return connection.execute(delete(riders).where(overdue)).rowcount


def _is_open() -> ColumnElement[bool]:
    return riders.c.status_code.is_(None) & (riders.c.expires_at > time.time())


def _answers(connection: Connection, server_id: str) -> list[RiderAnswer]:
    query = select(riders.c.id, riders.c.status_code, riders.c.answer).where(
        riders.c.server_id == server_id, riders.c.status_code.is_not(None)
    )
    return [
        RiderAnswer(rider_id=row.id, status_code=row.status_code, body=row.answer)
        for row in connection.execute(query).all()
    ]


def _remove(connection: Connection, rider_ids: Collection[str]) -> None:
    rows = [{"rider_id": rider_id} for rider_id in rider_ids]
    if rows:
        connection.execute(delete(riders).where(riders.c.id == bindparam("rider_id")), rows)


def _row(rider: Rider, *, server_id: str, party_id: str) -> dict[str, Any]:
    return {
        "id": rider.id,
        "server_id": server_id,
        "party_id": party_id,
        "endpoint": rider.endpoint,
        "model": rider.model,
        "body": json.dumps(rider.body),  # ASCII: a body may hold a lone surrogate
        "expires_at": rider.expires_at,
    }


def _rider(row: Row[Any]) -> Rider:
    return Rider(
        id=row.id,
        endpoint=Endpoint(row.endpoint),
        model=row.model,
        body=json.loads(row.body),
        expires_at=row.expires_at,
    )
