"""The lines of an ended batch that did not succeed, as an input file of their own and a wish for it.

Streamed from the input file: a line at a time.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from typing import BinaryIO, Final

from jobs.batch import Batch, BatchStatus
from jobs.errors import ConflictError, InvalidRequestError, NotFoundError
from jobs.file import BATCH_FILE_LIFETIME_S, File, Purpose, new_file_id
from jobs.ledger.ledger import Ledger
from jobs.stores.base import FileStore
from server.batch_request import BatchRequest

_COPY_BYTES: Final = 2**20


def retry_digest(batch_id: str) -> str:
    """What an idempotency key of a retry stands for."""
    return hashlib.sha256(f"retry:{batch_id}".encode()).hexdigest()


def check_retryable(batch: Batch) -> None:
    """Raises ConflictError for one that has not ended, or whose input was found wrong."""
    if not batch.status.is_final or batch.status is BatchStatus.FAILED:
        raise ConflictError(f"Cannot retry a batch with status '{batch.status}'.")


def make_retry_file(batch: Batch, ledger: Ledger, files: FileStore) -> File:
    """Written and on record. Raises ConflictError if nothing is left to do, InvalidRequestError if
    the input file is gone.
    """
    file_id = new_file_id()
    try:
        ledger.files.get(batch.input_file_id)
        with files.read(batch.input_file_id) as source, files.write(file_id) as stream:
            num_bytes = 0
            for part in _parts(batch, ledger, source):
                num_bytes += stream.write(part)
            if not num_bytes:
                message = f"Batch '{batch.id}' has no line left to retry: all have succeeded."
                raise ConflictError(message)
    except NotFoundError:
        message = f"Cannot find file {batch.input_file_id}."
        raise InvalidRequestError(message, param="file_id") from None
    now = int(time.time())
    file = File(
        id=file_id,
        purpose=Purpose.BATCH,
        filename=f"{batch.id}_retry.jsonl",
        num_bytes=num_bytes,
        created_at=now,
        expires_at=now + BATCH_FILE_LIFETIME_S,
    )
    try:
        ledger.files.add(file)
    except BaseException:
        files.delete(file_id)
        raise
    return file


def delete_retry_file(file: File, ledger: Ledger, files: FileStore) -> None:
    """Nobody was told of it: no batch came of it."""
    ledger.files.delete(file.id)
    files.delete(file.id)


def retry_request(batch: Batch, file: File) -> BatchRequest:
    """All as it was asked for the first time, but for the lines."""
    return BatchRequest(
        input_file_id=file.id,
        endpoint=batch.endpoint,
        completion_window=batch.completion_window,
        metadata=batch.metadata,
        output_expires_after=batch.output_expires_after,
        options=dataclasses.replace(batch.options, retry_of=batch.id),
    )


def _parts(batch: Batch, ledger: Ledger, source: BinaryIO) -> Iterator[bytes]:
    if batch.in_progress_at is None:  # not one line was looked at: all of them are left
        while data := source.read(_COPY_BYTES):
            yield data
        return
    for line in ledger.lines.unfinished(batch.id):
        source.seek(line.offset_bytes)
        yield source.read(line.num_bytes)
        yield b"\n"
