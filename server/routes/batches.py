"""`/v1/batches`: a batch is checked, recorded and rung for here; what becomes of it is not."""

import time
from typing import Annotated

from fastapi import APIRouter, Header, Query

from jobs.batch import Batch, BatchStatus, new_batch_id
from jobs.errors import ConflictError, InvalidRequestError, NotFoundError
from jobs.file import Purpose
from jobs.ledger.batches import IdempotencyKey
from jobs.ledger.ledger import Ledger
from jobs.openai import BatchObject, ListPage, batch_object, list_page
from jobs.stores.base import FileStore
from server.batch_options import check_webhook
from server.batch_request import SCHEMA, BatchRequest, parse_batch_request
from server.deps import BellDep, FilesDep, JsonBodyDep, LedgerDep, SettingsDep
from server.retry import (
    check_retryable,
    delete_retry_file,
    make_retry_file,
    retry_digest,
    retry_request,
)

router = APIRouter(tags=["batches"])
_KeyHeader = Annotated[str | None, Header(min_length=1, max_length=255)]
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": SCHEMA}}}}


@router.post("/v1/batches", openapi_extra=_BODY)
def create_batch(
    *,
    body: JsonBodyDep,
    ledger: LedgerDep,
    files: FilesDep,
    bell: BellDep,
    settings: SettingsDep,
    idempotency_key: _KeyHeader = None,
) -> BatchObject:
    """With a key of the client's own, asking again makes no second batch."""
    request = parse_batch_request(body)
    check_webhook(request.options.webhook, settings)
    key = None
    if idempotency_key is not None:
        key = IdempotencyKey(key=idempotency_key, digest=request.digest)
        known = ledger.batches.of_key(key)
        if known is not None:
            return batch_object(known)
    _check_input_file(request.input_file_id, ledger)
    batch = _record(request, key, ledger, files)
    bell.validate(batch.id)
    return batch_object(batch)


def _check_input_file(file_id: str, ledger: Ledger) -> None:
    try:
        file = ledger.files.get(file_id)
    except NotFoundError:
        raise _no_input_file(file_id) from None
    if file.purpose is not Purpose.BATCH:
        message = (
            f"Invalid purpose of file '{file_id}': expected 'batch', but got '{file.purpose}' "
            "instead."
        )
        raise InvalidRequestError(message, param="input_file_id", code="invalid_value")


def _record(
    request: BatchRequest, key: IdempotencyKey | None, ledger: Ledger, files: FileStore
) -> Batch:
    """The batch, committed together with a snapshot of its input that no deletion reaches; or
    another one that took the key meanwhile.
    """
    now = int(time.time())
    batch = Batch(
        id=new_batch_id(),
        endpoint=request.endpoint,
        input_file_id=request.input_file_id,
        completion_window=request.completion_window,
        created_at=now,
        expires_at=now + request.lifetime_s,
        metadata=request.metadata,
        output_expires_after=request.output_expires_after,
        options=request.options,
    )
    try:
        files.link(request.input_file_id, batch.input_blob)
    except NotFoundError:  # deleted since it was looked up
        raise _no_input_file(request.input_file_id) from None
    try:
        is_new = ledger.batches.add(batch, key=key)
    except BaseException:
        files.delete(batch.input_blob)
        raise
    if is_new or key is None:
        return batch
    files.delete(batch.input_blob)
    known = ledger.batches.of_key(key)
    assert known is not None
    return known


def _no_input_file(file_id: str) -> InvalidRequestError:
    return InvalidRequestError(f"Cannot find file {file_id[:100]}.", param="file_id")


@router.get("/v1/batches")
def list_batches(
    ledger: LedgerDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> ListPage[BatchObject]:
    page = ledger.batches.page(limit=limit, after=after)
    return list_page([batch_object(batch) for batch in page.items], has_more=page.has_more)


@router.get("/v1/batches/{batch_id}")
def get_batch(batch_id: str, ledger: LedgerDep) -> BatchObject:
    return batch_object(ledger.batches.get(batch_id))


@router.post("/v1/batches/{batch_id}/cancel")
def cancel_batch(batch_id: str, ledger: LedgerDep, bell: BellDep) -> BatchObject:
    """Cancelling twice is one cancel; what has ended, or is about to, is refused."""
    moved = ledger.batches.advance(batch_id, BatchStatus.CANCELLING)
    batch = ledger.batches.get(batch_id)
    if moved:
        bell.finalize(batch_id)
    elif batch.status not in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
        raise ConflictError(f"Cannot cancel a batch with status '{batch.status}'.")
    return batch_object(batch)


@router.post("/v1/batches/{batch_id}/retry")
def retry_batch(
    batch_id: str,
    *,
    ledger: LedgerDep,
    files: FilesDep,
    bell: BellDep,
    idempotency_key: _KeyHeader = None,
) -> BatchObject:
    """A new batch of the lines of an ended one that did not succeed."""
    batch = ledger.batches.get(batch_id)
    key = None
    if idempotency_key is not None:
        key = IdempotencyKey(key=idempotency_key, digest=retry_digest(batch.id))
        known = ledger.batches.of_key(key)
        if known is not None:
            return batch_object(known)
    check_retryable(batch)
    file = make_retry_file(batch, ledger, files)
    try:
        again = _record(retry_request(batch, file), key, ledger, files)
    except BaseException:
        delete_retry_file(file, ledger, files)
        raise
    if again.input_file_id != file.id:  # another request took the key meanwhile
        delete_retry_file(file, ledger, files)
    bell.validate(again.id)
    return batch_object(again)
