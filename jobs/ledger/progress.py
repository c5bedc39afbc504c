"""The ledger's expectations: how fast a worker goes, and when each live batch may be done."""

import dataclasses
from collections.abc import Mapping

from sqlalchemy import Connection, delete, insert, select

from jobs.batch import Estimate
from jobs.ledger.database import Database
from jobs.ledger.tables import estimates, paces


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Generated tokens a second, of all rows together: as measured lately, and as planned."""

    tokens_per_s: float | None = None
    predicted_tokens_per_s: float | None = None


class ProgressRecords:
    """Nothing is decided by them: a lost one is noted anew."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def note_pace(self, model_id: str, pace: Pace) -> None:
        with self._database.writing() as connection:
            connection.execute(delete(paces).where(paces.c.model_id == model_id))
            row = {"model_id": model_id, **dataclasses.asdict(pace)}
            connection.execute(insert(paces).values(**row))

    def pace(self, model_id: str) -> Pace:
        with self._database.reading() as connection:
            query = select(paces).where(paces.c.model_id == model_id)
            row = connection.execute(query).one_or_none()
        if row is None:
            return Pace()
        return Pace(
            tokens_per_s=row.tokens_per_s, predicted_tokens_per_s=row.predicted_tokens_per_s
        )

    def note_estimates(self, found: Mapping[str, Estimate]) -> None:
        """By batch; those of all others are forgotten."""
        with self._database.writing() as connection:
            connection.execute(delete(estimates))
            rows = [
                {"batch_id": batch_id, **dataclasses.asdict(estimate)}
                for batch_id, estimate in found.items()
            ]
            if rows:
                connection.execute(insert(estimates), rows)


def read_estimate(connection: Connection, batch_id: str) -> Estimate | None:
    query = select(estimates).where(estimates.c.batch_id == batch_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    return Estimate(
        noted_at=row.noted_at,
        position=row.position,
        tokens_per_s=row.tokens_per_s,
        seconds_left=row.seconds_left,
    )
