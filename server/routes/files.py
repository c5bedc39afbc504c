"""`/v1/files`: bytes stream through to the file store and back; never a whole file in memory."""

import contextlib
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Annotated, Any, BinaryIO, Final

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from jobs.errors import InvalidRequestError
from jobs.file import UPLOAD_PURPOSES, File, Purpose, new_file_id
from jobs.ledger.files import Order
from jobs.ledger.ledger import Ledger
from jobs.openai import FileDeleted, FileObject, ListPage, file_object, list_page
from jobs.stores.base import FileStore
from server.deps import FilesDep, LedgerDep, SettingsDep
from server.download import content_response
from server.upload import Upload, UploadParser

router = APIRouter(tags=["files"])
_WRITE_BYTES: Final = 2**20
_NOT_DOWNLOADABLE: Final = (Purpose.ASSISTANTS, Purpose.USER_DATA)
_FORM: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [purpose.value for purpose in UPLOAD_PURPOSES]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3_600, "maximum": 2_592_000},
    },
}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
_CONTENT: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"application/octet-stream": {}, "application/jsonl": {}}}
}


@router.post("/v1/files", openapi_extra=_BODY)
async def upload_file(
    request: Request, ledger: LedgerDep, files: FilesDep, settings: SettingsDep
) -> FileObject:
    parser = UploadParser(
        request.headers.get("content-type"), max_batch_bytes=settings.max_file_bytes
    )
    file_id = new_file_id()
    async with _in_threads(files.write(file_id)) as stream:
        upload = await _receive(request, parser, stream)
    return file_object(await run_in_threadpool(_record, file_id, upload, ledger, files))


async def _receive(request: Request, parser: UploadParser, stream: BinaryIO) -> Upload:
    async for data in request.stream():
        parser.feed(data)
        if parser.num_pending_bytes >= _WRITE_BYTES:
            await run_in_threadpool(stream.write, parser.take())
    await run_in_threadpool(stream.write, parser.take())
    return parser.finish()


def _record(file_id: str, upload: Upload, ledger: Ledger, files: FileStore) -> File:
    now = int(time.time())
    file = File(
        id=file_id,
        purpose=upload.purpose,
        filename=upload.filename,
        num_bytes=upload.num_bytes,
        created_at=now,
        expires_at=None if upload.lifetime_s is None else now + upload.lifetime_s,
    )
    try:
        ledger.files.add(file)
    except BaseException:
        files.delete(file_id)
        raise
    return file


@contextlib.asynccontextmanager
async def _in_threads(manager: AbstractContextManager[BinaryIO]) -> AsyncIterator[BinaryIO]:
    """The context, entered and left off the event loop: publishing a blob waits for the disk."""
    stream = await run_in_threadpool(manager.__enter__)
    try:
        yield stream
    except BaseException:
        # Not in a thread: a cancelled request could not wait for it.
        manager.__exit__(*sys.exc_info())
        raise
    await run_in_threadpool(manager.__exit__, None, None, None)


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
