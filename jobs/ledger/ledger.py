"""The ledger: the one durable truth about files, batches, lines, results and served models."""

import dataclasses

from sqlalchemy import select

from jobs.errors import NotFoundError
from jobs.ledger.batches import BatchRecords
from jobs.ledger.database import Database
from jobs.ledger.files import FileRecords
from jobs.ledger.lines import LineRecords
from jobs.ledger.tables import models


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that this installation serves."""

    id: str
    created_at: int
    max_context_tokens: int


class ModelRecords:
    def __init__(self, database: Database) -> None:
        self._database = database

    def serve(self, model: Model) -> None:
        """Make `model` the served one. Idempotent; keeps the first `created_at`."""
        with self._database.writing() as connection:
            connection.execute(models.delete().where(models.c.id != model.id))
            connection.execute(
                self._database.insert_or_ignore(models).values(**dataclasses.asdict(model))
            )

    def all(self) -> list[Model]:
        with self._database.reading() as connection:
            rows = connection.execute(select(models).order_by(models.c.id)).mappings().all()
        return [Model(**row) for row in rows]

    def get(self, model_id: str) -> Model:
        """Raises NotFoundError."""
        for model in self.all():
            if model.id == model_id:
                return model
        raise NotFoundError(
            f"The model '{model_id}' does not exist", param="model", code="model_not_found"
        )


class Ledger:
    """Open once a process; safe from several threads and processes. Close when done."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.files = FileRecords(database)
        self.batches = BatchRecords(database)
        self.lines = LineRecords(database)
        self.models = ModelRecords(database)

    @classmethod
    def open(cls, url: str) -> "Ledger":
        """Raises LedgerError."""
        return cls(Database.open(url))

    def close(self) -> None:
        self._database.close()
