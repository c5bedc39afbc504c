"""A finished upload's file, made of its parts in the order asked for; never whole in memory."""

import hashlib
import time
from collections.abc import Iterator

from jobs.errors import InvalidRequestError, NotFoundError
from jobs.file import File, Purpose, new_file_id
from jobs.ledger.ledger import Ledger
from jobs.ledger.uploads import check_pending
from jobs.stores.base import FileStore
from jobs.upload import Upload, UploadStatus
from server.batch_file import BatchFileCheck
from server.upload_request import Completion

_COPY_BYTES = 2**20


def complete(
    upload: Upload,
    completion: Completion,
    *,
    ledger: Ledger,
    files: FileStore,
    max_batch_bytes: int,
) -> None:
    """Make the file and end the upload. Doing it again changes nothing.

    Raises InvalidRequestError for parts or a sum that do not fit, or an upload that has ended.
    """
    if upload.status is UploadStatus.COMPLETED and upload.part_ids == completion.part_ids:
        return  # asked again by a client that heard no answer
    check_pending(upload, "complete")
    _check_parts(upload, completion, ledger)
    file_id = new_file_id()
    try:
        with files.write(file_id) as stream:
            digest = hashlib.md5(usedforsecurity=False)
            check = BatchFileCheck(max_bytes=max_batch_bytes)
            for data in _content(completion, files):
                digest.update(data)
                check.look(data)
                stream.write(data)
            _check_content(upload, completion, digest.hexdigest(), check)
    except NotFoundError:  # its parts went: it was completed, cancelled or expired meanwhile
        check_pending(ledger.uploads.get(upload.id), "complete")
        raise
    if not ledger.uploads.complete(
        upload.id, part_ids=completion.part_ids, file=_file(upload, file_id)
    ):
        files.delete(file_id)
        complete(
            ledger.uploads.get(upload.id),
            completion,
            ledger=ledger,
            files=files,
            max_batch_bytes=max_batch_bytes,
        )


def _check_parts(upload: Upload, completion: Completion, ledger: Ledger) -> None:
    parts = ledger.uploads.parts(upload.id)
    for part_id in completion.part_ids:
        if part_id not in parts:
            raise InvalidRequestError(
                f"Invalid 'part_ids': no part with id '{part_id[:100]}' in this upload.",
                param="part_ids",
                code="invalid_value",
            )
    num_bytes = sum(parts[part_id].num_bytes for part_id in completion.part_ids)
    if num_bytes != upload.num_bytes:
        raise InvalidRequestError(
            f"The parts hold {num_bytes} bytes in all, but the upload was announced with "
            f"{upload.num_bytes} bytes.",
            param="part_ids",
            code="invalid_value",
        )


def _content(completion: Completion, files: FileStore) -> Iterator[bytes]:
    for part_id in completion.part_ids:
        with files.read(part_id) as part:
            while data := part.read(_COPY_BYTES):
                yield data


def _check_content(upload: Upload, completion: Completion, md5: str, check: BatchFileCheck) -> None:
    if completion.md5 not in (None, md5):
        raise InvalidRequestError(
            f"The md5 of the assembled file is {md5}, not {completion.md5}.",
            param="md5",
            code="invalid_value",
        )
    if upload.purpose is Purpose.BATCH:
        check.finish()


def _file(upload: Upload, file_id: str) -> File:
    now = int(time.time())
    lifetime_s = upload.file_lifetime_s
    return File(
        id=file_id,
        purpose=upload.purpose,
        filename=upload.filename,
        num_bytes=upload.num_bytes,
        created_at=now,
        expires_at=None if lifetime_s is None else now + lifetime_s,
    )
