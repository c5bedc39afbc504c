"""The application as it is, with objects under whatever ids a request names: made anew before it.

For tests that were written against a mock, where every id is known and nothing is ever used up.
"""

import time
from collections.abc import Callable

from sqlalchemy import delete
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.batch import Batch, Endpoint
from jobs.errors import NotFoundError
from jobs.file import File, Purpose
from jobs.ledger.ledger import Ledger
from jobs.ledger.tables import files, upload_parts, uploads
from jobs.stores.base import FileStore
from jobs.upload import Part, Upload

_CONTENT = b"{}\n" * 8
_LATER_S = 3_600


class FixedIds:
    """`part_ids` are those of the parts that each upload has."""

    def __init__(
        self, app: ASGIApp, ledger: Ledger, store: FileStore, *, part_ids: tuple[str, ...]
    ) -> None:
        self._app = app
        self._ledger = ledger
        self._store = store
        self._part_ids = part_ids
        self._makers: dict[str, Callable[[str], None]] = {
            "files": self.make_file,
            "batches": self._make_batch,
            "uploads": self._make_upload,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await run_in_threadpool(self._make_what_is_named, scope["path"])
        await self._app(scope, receive, send)

    def make_file(self, file_id: str) -> None:
        self._write(file_id)
        with self._ledger._database.writing() as connection:
            connection.execute(delete(files).where(files.c.id == file_id))
        self._ledger.files.add(
            File(
                id=file_id,
                purpose=Purpose.BATCH,
                filename="in.jsonl",
                num_bytes=len(_CONTENT),
                created_at=int(time.time()),
                expires_at=None,
            )
        )

    def _make_what_is_named(self, path: str) -> None:
        kind, _, rest = path.removeprefix("/v1/").partition("/")
        object_id = rest.partition("/")[0]
        if object_id and kind in self._makers:
            self._makers[kind](object_id)

    def _make_batch(self, batch_id: str) -> None:
        try:
            self._ledger.batches.get(batch_id)
        except NotFoundError:
            now = int(time.time())
            self._ledger.batches.add(
                Batch(
                    id=batch_id,
                    endpoint=Endpoint.COMPLETIONS,
                    input_file_id="file-x",
                    completion_window="24h",
                    created_at=now,
                    expires_at=now + _LATER_S,
                )
            )

    def _make_upload(self, upload_id: str) -> None:
        now = int(time.time())
        with self._ledger._database.writing() as connection:
            connection.execute(delete(upload_parts).where(upload_parts.c.upload_id == upload_id))
            connection.execute(delete(uploads).where(uploads.c.id == upload_id))
        self._ledger.uploads.add(
            Upload(
                id=upload_id,
                purpose=Purpose.ASSISTANTS,
                filename="in.jsonl",
                mime_type="application/jsonl",
                num_bytes=len(_CONTENT) * len(self._part_ids),
                created_at=now,
                expires_at=now + _LATER_S,
                file_lifetime_s=None,
            )
        )
        for part_id in self._part_ids:
            self._write(part_id)
            self._ledger.uploads.add_part(
                Part(id=part_id, upload_id=upload_id, num_bytes=len(_CONTENT), created_at=now)
            )

    def _write(self, name: str) -> None:
        with self._store.write(name) as stream:
            stream.write(_CONTENT)
