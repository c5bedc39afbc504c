"""The ledger: the one durable truth about files, batches, lines, results, riders and served models."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Final

from sqlalchemy import select

from jobs.batch import SNAPSHOT_PREFIX
from jobs.errors import NotFoundError
from jobs.ledger.batches import BatchRecords
from jobs.ledger.database import Database
from jobs.ledger.deliveries import DeliveryRecords
from jobs.ledger.files import FileRecords
from jobs.ledger.groups import GroupRecords
from jobs.ledger.keys import KeyRecords
from jobs.ledger.lines import LineRecords
from jobs.ledger.progress import ProgressRecords
from jobs.ledger.ranks import RankRecords
from jobs.ledger.riders import RiderRecords
from jobs.ledger.scope import WHOLE, Scope
from jobs.ledger.tables import models
from jobs.ledger.uploads import UploadRecords
from jobs.stores.base import FileStore
from jobs.tenant import Caller
from jobs.values import shown

_ASKED_AT_ONCE: Final = 500


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
        raise no_model(model_id)


def no_model(model_id: str) -> NotFoundError:
    return NotFoundError(
        f"The model '{shown(model_id)}' does not exist", param="model", code="model_not_found"
    )


class Ledger:
    """Open once a process; safe from several threads and processes. Close when done.

    Opened, it is the whole of it. What a caller is shown is a view: `seen_by`.
    """

    def __init__(self, database: Database, scope: Scope = WHOLE) -> None:
        self._database = database
        self.files = FileRecords(database, scope)
        self.batches = BatchRecords(database, scope)
        self.uploads = UploadRecords(database, scope)
        self.lines = LineRecords(database)
        self.groups = GroupRecords(database)
        self.deliveries = DeliveryRecords(database)
        self.progress = ProgressRecords(database)
        self.ranks = RankRecords(database)
        self.models = ModelRecords(database)
        self.riders = RiderRecords(database)
        self.keys = KeyRecords(database)

    @classmethod
    def open(cls, url: str) -> "Ledger":
        """Raises LedgerError."""
        return cls(Database.open(url))

    def seen_by(self, caller: Caller) -> "Ledger":
        """The same ledger with the files, uploads and batches of the caller's tenant alone: others'
        are as if they had never been, and what is added is the tenant's, within the caller's limits.
        """
        return Ledger(self._database, Scope(caller=caller))

    def close(self) -> None:
        self._database.close()


def delete_unreferenced_blobs(ledger: Ledger, store: FileStore, *, older_than_s: float) -> int:
    """Free what a crash between store and ledger left; how many blobs went.

    `older_than_s` must outlast any writer: a blob is published before its record is.
    """
    first_created_at = ledger.files.first_created_at()
    if first_created_at is None:
        return 0
    newest = time.time() - older_than_s
    # What is older than a ledger is another one's, which the settings may point at again.
    due = (
        name for name in list(store.names()) if first_created_at <= _named_at(store, name) <= newest
    )
    num_deleted = 0
    while part := list(itertools.islice(due, _ASKED_AT_ONCE)):
        num_deleted += sum(store.delete(name) for name in _unreferenced(ledger, part))
    return num_deleted


def _named_at(store: FileStore, name: str) -> float:
    try:
        return store.named_at(name)
    except NotFoundError:  # deleted meanwhile
        return math.inf


def _unreferenced(ledger: Ledger, names: Sequence[str]) -> Iterator[str]:
    held = ledger.files.held(names) | ledger.uploads.held(names)
    batch_ids = [name.removeprefix(SNAPSHOT_PREFIX) for name in names]
    statuses = ledger.batches.statuses(batch_ids)
    for name, batch_id in zip(names, batch_ids, strict=True):
        is_snapshot = name != batch_id and batch_id in statuses
        if name not in held and not (is_snapshot and not statuses[batch_id].is_final):
            yield name
