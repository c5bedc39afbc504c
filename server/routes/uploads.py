"""`/v1/uploads`: files that come in parts."""

import time
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from jobs.errors import InvalidRequestError, NotFoundError
from jobs.file import File
from jobs.ledger.ledger import Ledger
from jobs.ledger.uploads import check_pending
from jobs.openai import PartObject, UploadObject, part_object, upload_object
from jobs.stores.base import FileStore
from jobs.upload import (
    MAX_PART_BYTES,
    UPLOAD_LIFETIME_S,
    Part,
    Upload,
    UploadStatus,
    new_part_id,
    new_upload_id,
)
from server import assembly
from server.deps import FilesDep, JsonBodyDep, LedgerDep, SettingsDep
from server.multipart import FormParser
from server.receive import in_threads, receive
from server.upload_request import (
    COMPLETION_SCHEMA,
    UPLOAD_SCHEMA,
    parse_completion,
    parse_upload_request,
)

router = APIRouter(tags=["uploads"])
_PART_FORM: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "format": "binary"}},
}


def _body(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


@router.post("/v1/uploads", openapi_extra=_body("application/json", UPLOAD_SCHEMA))
def create_upload(body: JsonBodyDep, ledger: LedgerDep, settings: SettingsDep) -> UploadObject:
    request = parse_upload_request(body, max_batch_bytes=settings.max_file_bytes)
    now = int(time.time())
    upload = Upload(
        id=new_upload_id(),
        purpose=request.purpose,
        filename=request.filename,
        mime_type=request.mime_type,
        num_bytes=request.num_bytes,
        created_at=now,
        expires_at=now + UPLOAD_LIFETIME_S,
        file_lifetime_s=request.file_lifetime_s,
    )
    ledger.uploads.add(upload)
    return upload_object(upload)


def _pending(upload_id: str, ledger: LedgerDep) -> Upload:
    """Looked up before the body is read: what is refused anyway is not sent in vain."""
    upload = ledger.uploads.get(upload_id)
    check_pending(upload, "add a part to")
    return upload


@router.post(
    "/v1/uploads/{upload_id}/parts", openapi_extra=_body("multipart/form-data", _PART_FORM)
)
async def add_part(
    request: Request,
    upload: Annotated[Upload, Depends(_pending)],
    ledger: LedgerDep,
    files: FilesDep,
) -> PartObject:
    form = FormParser(
        request.headers.get("content-type"),
        file_field="data",
        text_fields=(),
        max_file_bytes=MAX_PART_BYTES,
    )
    part_id = new_part_id()
    async with in_threads(files.write(part_id)) as stream:
        await receive(request, form, stream)
        form.finish()
        if form.num_file_bytes == 0:
            raise InvalidRequestError("A part must hold data.", param="data")
    part = Part(
        id=part_id,
        upload_id=upload.id,
        num_bytes=form.num_file_bytes,
        created_at=int(time.time()),
    )
    await run_in_threadpool(_record_part, part, ledger, files)
    return part_object(part)


def _record_part(part: Part, ledger: Ledger, files: FileStore) -> None:
    try:
        ledger.uploads.add_part(part)
    except BaseException:
        files.delete(part.id)
        raise


@router.post(
    "/v1/uploads/{upload_id}/complete", openapi_extra=_body("application/json", COMPLETION_SCHEMA)
)
def complete_upload(
    upload_id: str, *, body: JsonBodyDep, ledger: LedgerDep, files: FilesDep, settings: SettingsDep
) -> UploadObject:
    completion = parse_completion(body)
    assembly.complete(
        ledger.uploads.get(upload_id),
        completion,
        ledger=ledger,
        files=files,
        max_batch_bytes=settings.max_file_bytes,
    )
    _free_parts(upload_id, ledger, files)
    upload = ledger.uploads.get(upload_id)
    return upload_object(upload, _file_of(upload, ledger))


@router.post("/v1/uploads/{upload_id}/cancel")
def cancel_upload(upload_id: str, ledger: LedgerDep, files: FilesDep) -> UploadObject:
    """Cancelling twice is one cancel; what was completed or has expired is refused."""
    upload = ledger.uploads.get(upload_id)
    if upload.status is not UploadStatus.CANCELLED and not ledger.uploads.cancel(upload_id):
        check_pending(ledger.uploads.get(upload_id), "cancel")
    _free_parts(upload_id, ledger, files)
    return upload_object(ledger.uploads.get(upload_id))


def _free_parts(upload_id: str, ledger: Ledger, files: FileStore) -> None:
    for part_id in ledger.uploads.parts(upload_id):
        files.delete(part_id)
        ledger.uploads.forget_part(part_id)


def _file_of(upload: Upload, ledger: Ledger) -> File | None:
    """None, too, for a file that was deleted or has expired since."""
    if upload.file_id is None:
        return None
    try:
        return ledger.files.get(upload.file_id)
    except NotFoundError:
        return None
