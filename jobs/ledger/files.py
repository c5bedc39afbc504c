"""The ledger's file records: what exists, since when, until when; the bytes are elsewhere."""

import dataclasses
import re
import time
from collections.abc import Collection, Sequence
from typing import Any, Final, Generic, Literal, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, Table, func, insert, select, update

from jobs.errors import InvalidRequestError, NotFoundError
from jobs.file import File, Purpose
from jobs.ledger.database import Database
from jobs.ledger.scope import WHOLE, Scope
from jobs.ledger.tables import files
from jobs.ledger.usage import check_stored_bytes, is_live

Item = TypeVar("Item")
Order = Literal["asc", "desc"]
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[Item]):
    """Part of a list; `has_more` is exact."""

    items: Sequence[Item]
    has_more: bool


def is_id(text: str) -> bool:
    """Whether it can be an id at all. What cannot is never asked of a database: it may have no
    words for it, as for half a surrogate pair.
    """
    return _ID.fullmatch(text) is not None


def unknown_cursor(after: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid 'after': no object with id '{after}'.", param="after")


def no_file(file_id: str) -> NotFoundError:
    return NotFoundError(f"No such File object: {file_id}", param="id")


def position_of(
    connection: Connection, table: Table, after: str, *, owned: ColumnElement[bool]
) -> int:
    """Where a page begins. Raises InvalidRequestError for an `after` that never existed."""
    position = None
    if is_id(after):
        query = select(table.c.seq).where(table.c.id == after, owned)
        position = connection.execute(query).scalar()
    if position is None:
        raise unknown_cursor(after)
    return int(position)


class FileRecords:
    def __init__(self, database: Database, scope: Scope = WHOLE) -> None:
        self._database = database
        self._scope = scope
        self._owned = scope.owns(files)

    def add(self, file: File) -> None:
        """It is the scope's, if that is one tenant's. Raises QuotaError."""
        with self._database.writing(alone=self._scope.tenant) as connection:
            check_stored_bytes(connection, self._scope.caller, file.num_bytes)
            connection.execute(insert(files).values(**self._row(file)))

    def check_room(self) -> None:
        """Raises QuotaError if not one byte more may be stored."""
        with self._database.reading() as connection:
            check_stored_bytes(connection, self._scope.caller, 1)

    def add_once(self, file: File) -> None:
        """Add the record unless its id is there: whoever writes a result file again adds no second."""
        with self._database.writing() as connection:
            connection.execute(self._database.insert_or_ignore(files).values(**self._row(file)))

    def _row(self, file: File) -> dict[str, Any]:
        return dataclasses.asdict(file) | {"tenant": self._scope.owner_of_new(file.tenant)}

    def get(self, file_id: str) -> File:
        """Raises NotFoundError for unknown, deleted and expired files alike."""
        if not is_id(file_id):
            raise no_file(file_id)
        with self._database.reading() as connection:
            query = select(files).where(files.c.id == file_id, self._owned, is_live())
            row = connection.execute(query).one_or_none()
        if row is None:
            raise no_file(file_id)
        return _file(row)

    def page(
        self, *, limit: int, purpose: str | None = None, order: Order = "desc", after: str | None
    ) -> Page[File]:
        """Files by creation. Raises InvalidRequestError for an `after` that never existed."""
        query = select(files).where(self._owned, is_live())
        query = query.order_by(files.c.seq.desc() if order == "desc" else files.c.seq.asc())
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._database.reading() as connection:
            if after is not None:
                position = position_of(connection, files, after, owned=self._owned)
                query = query.where(
                    files.c.seq < position if order == "desc" else files.c.seq > position
                )
            rows = connection.execute(query.limit(limit + 1)).all()
        return Page(items=[_file(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def delete(self, file_id: str) -> None:
        """Raises NotFoundError, also for the second delete."""
        if not is_id(file_id):
            raise no_file(file_id)
        with self._database.writing() as connection:
            done = connection.execute(
                update(files)
                .where(files.c.id == file_id, self._owned, is_live())
                .values(deleted_at=int(time.time()))
            )
        if done.rowcount == 0:
            raise no_file(file_id)

    def held(self, file_ids: Collection[str]) -> set[str]:
        """Those of the ids whose bytes a record still stands for, be it expired."""
        query = select(files.c.id).where(files.c.id.in_(file_ids), files.c.deleted_at.is_(None))
        with self._database.reading() as connection:
            return set(connection.execute(query).scalars())

    def first_created_at(self) -> int | None:
        """When the oldest record was made, deleted ones too; None if there never was one."""
        with self._database.reading() as connection:
            return connection.execute(select(func.min(files.c.created_at))).scalar()

    def expired(self) -> list[str]:
        """Ids of files past their time whose bytes may go."""
        with self._database.reading() as connection:
            query = select(files.c.id).where(
                files.c.deleted_at.is_(None), files.c.expires_at <= int(time.time())
            )
            return list(connection.execute(query).scalars())

    def forget(self, file_id: str) -> None:
        """Mark an expired file as deleted, its bytes being gone."""
        with self._database.writing() as connection:
            connection.execute(
                update(files).where(files.c.id == file_id).values(deleted_at=int(time.time()))
            )


def _file(row: Row[Any]) -> File:
    return File(
        id=row.id,
        purpose=Purpose(row.purpose),
        filename=row.filename,
        num_bytes=row.num_bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        tenant=row.tenant,
    )
