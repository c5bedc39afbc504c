"""The ledger's uploads and their parts: what may still be added, and what became of it."""

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    delete,
    func,
    insert,
    not_,
    select,
    update,
)

from jobs.errors import InvalidRequestError, NotFoundError
from jobs.file import File, Purpose
from jobs.ledger.database import Database
from jobs.ledger.files import is_id
from jobs.ledger.scope import WHOLE, Scope
from jobs.ledger.tables import files, upload_parts, uploads
from jobs.ledger.usage import check_stored_bytes, is_pending
from jobs.upload import MAX_PARTS, Part, Upload, UploadStatus


class UploadRecords:
    """A pending upload past its time is an expired one, whoever asks and whenever."""

    def __init__(self, database: Database, scope: Scope = WHOLE) -> None:
        self._database = database
        self._scope = scope
        self._owned = scope.owns(uploads)

    def add(self, upload: Upload) -> None:
        """It is the scope's, if that is one tenant's. Raises QuotaError if its parts would."""
        with self._database.writing(alone=self._scope.tenant) as connection:
            check_stored_bytes(connection, self._scope.caller, upload.num_bytes)
            row = dataclasses.asdict(upload) | {
                "part_ids": list(upload.part_ids),
                "tenant": self._scope.owner_of_new(upload.tenant),
            }
            connection.execute(insert(uploads).values(**row))

    def get(self, upload_id: str) -> Upload:
        """Raises NotFoundError."""
        with self._database.reading() as connection:
            return _read(connection, upload_id, owned=self._owned)

    def parts(self, upload_id: str) -> dict[str, Part]:
        """By id, those that still have their bytes."""
        query = (
            select(upload_parts)
            .join(uploads, uploads.c.id == upload_parts.c.upload_id)
            .where(upload_parts.c.upload_id == upload_id, self._owned)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).mappings().all()
        return {row["id"]: Part(**row) for row in rows}

    def add_part(self, part: Part) -> None:
        """Raises NotFoundError, QuotaError, and InvalidRequestError if the upload takes no more."""
        with self._database.writing(alone=self._scope.tenant) as connection:
            upload = _read(connection, part.upload_id, owned=self._owned)
            check_pending(upload, "add a part to")
            mine = upload_parts.c.upload_id == part.upload_id
            num_parts, num_bytes = connection.execute(
                select(func.count(), func.coalesce(func.sum(upload_parts.c.num_bytes), 0)).where(
                    mine
                )
            ).one()
            if num_parts >= MAX_PARTS:
                raise InvalidRequestError(f"An upload may have at most {MAX_PARTS} parts.")
            # Twice: a client that heard no answer sends a part again.
            if num_bytes + part.num_bytes > 2 * upload.num_bytes:
                raise InvalidRequestError(
                    f"The parts hold {num_bytes + part.num_bytes} bytes, more than twice the "
                    f"{upload.num_bytes} bytes that the upload was announced with."
                )
            check_stored_bytes(connection, self._scope.caller, part.num_bytes)
            connection.execute(insert(upload_parts).values(**dataclasses.asdict(part)))

    def complete(self, upload_id: str, *, part_ids: Sequence[str], file: File) -> bool:
        """The file's record and the upload's end in one; False if it was not pending any more.

        Never over a limit: the file takes the place of at least as many bytes in parts.
        """
        with self._database.writing() as connection:
            moved = connection.execute(
                update(uploads)
                .where(uploads.c.id == upload_id, self._owned, is_pending())
                .values(status=UploadStatus.COMPLETED, file_id=file.id, part_ids=list(part_ids))
            )
            if moved.rowcount == 0:
                return False
            row = dataclasses.asdict(file) | {"tenant": self._scope.owner_of_new(file.tenant)}
            connection.execute(insert(files).values(**row))
            return True

    def cancel(self, upload_id: str) -> bool:
        """Whether it was pending."""
        with self._database.writing() as connection:
            moved = connection.execute(
                update(uploads)
                .where(uploads.c.id == upload_id, self._owned, is_pending())
                .values(status=UploadStatus.CANCELLED)
            )
        return moved.rowcount == 1

    def needless_parts(self) -> list[str]:
        """Ids of parts whose upload takes no more of them: their bytes may go."""
        query = (
            select(upload_parts.c.id)
            .join(uploads, uploads.c.id == upload_parts.c.upload_id)
            .where(not_(is_pending()))
        )
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def forget_part(self, part_id: str) -> None:
        """Remove the record, the bytes being gone."""
        with self._database.writing() as connection:
            connection.execute(delete(upload_parts).where(upload_parts.c.id == part_id))

    def held(self, part_ids: Collection[str]) -> set[str]:
        """Those of the ids whose bytes a record still stands for."""
        query = select(upload_parts.c.id).where(upload_parts.c.id.in_(part_ids))
        with self._database.reading() as connection:
            return set(connection.execute(query).scalars())


def check_pending(upload: Upload, deed: str) -> None:
    """Raises InvalidRequestError for an upload that has ended."""
    if upload.status is not UploadStatus.PENDING:
        raise InvalidRequestError(f"Cannot {deed} an upload with status '{upload.status}'.")


def _read(connection: Connection, upload_id: str, *, owned: ColumnElement[bool]) -> Upload:
    row = None
    if is_id(upload_id):
        query = select(uploads).where(uploads.c.id == upload_id, owned)
        row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"No such Upload object: {upload_id}", param="id")
    return _upload(row)


def _upload(row: Row[Any]) -> Upload:
    status = UploadStatus(row.status)
    if status is UploadStatus.PENDING and row.expires_at <= time.time():
        status = UploadStatus.EXPIRED
    plain = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it
    return Upload(
        **plain
        | {"status": status, "purpose": Purpose(row.purpose), "part_ids": tuple(row.part_ids)}
    )
