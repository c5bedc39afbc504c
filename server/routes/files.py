"""`/v1/files`: bytes stream through to the file store and back; never a whole file in memory."""

import time
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from jobs.errors import InvalidRequestError
from jobs.file import UPLOAD_PURPOSES, File, Purpose, new_file_id
from jobs.ledger.files import Order
from jobs.ledger.ledger import Ledger
from jobs.openai import FileDeleted, FileObject, ListPage, file_object, list_page
from jobs.stores.base import FileStore
from server import refusals
from server.deps import FilesDep, LedgerDep, SettingsDep
from server.download import content_response
from server.file_form import FileForm, ReceivedFile
from server.receive import in_threads, receive

router = APIRouter(tags=["files"])
_NOT_DOWNLOADABLE: Final = (Purpose.ASSISTANTS, Purpose.USER_DATA)
_FORM: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [purpose.value for purpose in UPLOAD_PURPOSES]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": refusals.MIN_EXPIRY_S,
            "maximum": refusals.MAX_EXPIRY_S,
        },
    },
}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
_CONTENT: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"application/octet-stream": {}, "application/jsonl": {}}}
}


def _check_room(ledger: LedgerDep) -> None:
    """Before the body is read: what is refused anyway is not sent in vain."""
    ledger.files.check_room()


@router.post("/v1/files", openapi_extra=_BODY, dependencies=[Depends(_check_room)])
async def upload_file(
    request: Request, ledger: LedgerDep, files: FilesDep, settings: SettingsDep
) -> FileObject:
    form = FileForm(request.headers.get("content-type"), max_batch_bytes=settings.max_file_bytes)
    file_id = new_file_id()
    async with in_threads(files.write(file_id)) as stream:
        await receive(request, form, stream)
        received = form.finish()
    return file_object(await run_in_threadpool(_record, file_id, received, ledger, files))


def _record(file_id: str, received: ReceivedFile, ledger: Ledger, files: FileStore) -> File:
    now = int(time.time())
    file = File(
        id=file_id,
        purpose=received.purpose,
        filename=received.filename,
        num_bytes=received.num_bytes,
        created_at=now,
        expires_at=None if received.lifetime_s is None else now + received.lifetime_s,
    )
    try:
        ledger.files.add(file)
    except BaseException:
        files.delete(file_id)
        raise
    return file


@router.get("/v1/files")
def list_files(
    ledger: LedgerDep,
    *,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
    after: str | None = None,
    purpose: str | None = None,
) -> ListPage[FileObject]:
    page = ledger.files.page(limit=limit, order=order, after=after, purpose=purpose)
    return list_page([file_object(file) for file in page.items], has_more=page.has_more)


@router.get("/v1/files/{file_id}")
def get_file(file_id: str, ledger: LedgerDep) -> FileObject:
    return file_object(ledger.files.get(file_id))


@router.delete("/v1/files/{file_id}")
def delete_file(file_id: str, ledger: LedgerDep, files: FilesDep) -> FileDeleted:
    ledger.files.delete(file_id)
    files.delete(file_id)
    return FileDeleted(id=file_id)


@router.get("/v1/files/{file_id}/content", response_class=Response, responses=_CONTENT)
def get_content(file_id: str, request: Request, ledger: LedgerDep, files: FilesDep) -> Response:
    file = ledger.files.get(file_id)
    if file.purpose in _NOT_DOWNLOADABLE:
        raise InvalidRequestError(f"Not allowed to download files of purpose: {file.purpose}")
    return content_response(file, files, request.headers)
