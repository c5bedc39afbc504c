"""One client's connection, with patience that ends: for a request's head, and for an answer taken.

Knows bytes and time, no routes; a request's body is paced in `server.pace`.
"""

import asyncio
import json
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_NOT_HTTP: Final = {
    "message": "Invalid HTTP request received.",
    "type": "invalid_request_error",
    "param": None,
    "code": None,
}


class Connection(H11Protocol):
    """`stall_s` bounds the time for a whole head, and the time in which nothing is taken."""

    stall_s = 60.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # narrower there
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_head()
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.stall_s, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """The envelope here too, where no application is reached."""
        body = json.dumps({"error": _NOT_HTTP}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_head(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.stall_s, self._cut)

    def _cut(self) -> None:
        # Not closed, which would wait for what is unsent: nobody takes it.
        self.transport.abort()


def connection_class(stall_s: float) -> type[Connection]:
    """For uvicorn, which makes connections itself."""
    return type("Connection", (Connection,), {"stall_s": stall_s})
