"""What every request gets: an id, one log line, and an answer even when a route fails."""

import secrets
import time
from typing import Final

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import internal_error

_API_VERSION: Final = "2020-10-01"


class RequestLog:
    """Outside everything else of the application. A trailing slash is dropped, not redirected."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if len(scope["path"]) > 1:
            scope["path"] = scope["path"].removesuffix("/")
        answer = _Answer(send, request_id=f"req_{secrets.token_hex(16)}")
        log = structlog.get_logger().bind(
            method=scope["method"], path=scope["path"], request_id=answer.request_id
        )
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            log.exception("request failed")
            if answer.status is not None:
                raise  # the connection must be cut: what was sent is not the whole answer
            await internal_error()(scope, receive, answer.send)
        finally:
            log.info("request", status=answer.status, taken_s=round(answer.taken_s, 4))


class _Answer:
    """The response on its way out."""

    def __init__(self, send: Send, *, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status: int | None = None
        self._began_s = time.monotonic()

    @property
    def taken_s(self) -> float:
        return time.monotonic() - self._began_s

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["openai-processing-ms"] = str(round(1_000 * self.taken_s))
            headers["openai-version"] = _API_VERSION
        await self._send(message)
