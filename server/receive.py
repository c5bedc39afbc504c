"""A form's file on its way to the store: as fast as both sides are, never whole in memory."""

import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import BinaryIO, Final, Protocol

from fastapi import Request
from starlette.concurrency import run_in_threadpool

_WRITE_BYTES: Final = 2**20


class Form(Protocol):
    """Takes a body and gives the bytes of the file in it."""

    @property
    def num_pending_bytes(self) -> int: ...
    def feed(self, data: bytes) -> None: ...
    def take(self) -> bytes: ...


async def receive(request: Request, form: Form, stream: BinaryIO) -> None:
    """The whole body through the form, its file's bytes into the stream."""
    async for data in request.stream():
        form.feed(data)
        if form.num_pending_bytes >= _WRITE_BYTES:
            await run_in_threadpool(stream.write, form.take())
    await run_in_threadpool(stream.write, form.take())


@contextlib.asynccontextmanager
async def in_threads(manager: AbstractContextManager[BinaryIO]) -> AsyncIterator[BinaryIO]:
    """The context, entered and left off the event loop: publishing a blob waits for the disk."""
    stream = await run_in_threadpool(manager.__enter__)
    try:
        yield stream
    except BaseException:
        # Not in a thread: a cancelled request could not wait for it.
        manager.__exit__(*sys.exc_info())
        raise
    await run_in_threadpool(manager.__exit__, None, None, None)
