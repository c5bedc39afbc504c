"""A request's body must keep coming: who stalls, or trickles, is answered and cut off."""

import asyncio
import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import RequestError

_MIN_BYTES_PER_S: Final = 1024
"""Of a body on average, once the first stall time is over."""


class StalledBodyError(RequestError):
    """The body did not come in time; sending it again may well succeed."""


class Pace:
    """Inside the log, outside the routes: the exception is raised to whoever reads the body."""

    def __init__(self, app: ASGIApp, *, stall_s: float) -> None:
        self._app = app
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            receive = _PacedBody(receive, self._stall_s).receive
        await self._app(scope, receive, send)


class _PacedBody:
    def __init__(self, receive: Receive, stall_s: float) -> None:
        self._receive = receive
        self._stall_s = stall_s
        self._began_s = time.monotonic()
        self._num_bytes = 0
        self._is_whole = False

    async def receive(self) -> Message:
        if self._is_whole:  # what is waited for now is only that the client goes away
            return await self._receive()
        try:
            async with asyncio.timeout(self._patience_s()):
                message = await self._receive()
        except TimeoutError:
            raise StalledBodyError(
                f"The request's body did not come in time: {self._num_bytes} bytes in "
                f"{time.monotonic() - self._began_s:.0f} s.",
                code="request_body_timeout",
            ) from None
        self._num_bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        return message

    def _patience_s(self) -> float:
        earned_s = self._stall_s + self._num_bytes / _MIN_BYTES_PER_S
        return max(0.0, min(self._stall_s, self._began_s + earned_s - time.monotonic()))
