"""What every request gets: an id, one log line, and an answer even when a route fails."""

import secrets
import time

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import internal_error


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
        started_s = time.monotonic()
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
            taken_s = round(time.monotonic() - started_s, 4)
            log.info("request", status=answer.status, taken_s=taken_s)


class _Answer:
    """The response on its way out."""

    def __init__(self, send: Send, *, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.request_id
        await self._send(message)
