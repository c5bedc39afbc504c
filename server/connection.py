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
    """`stall_s` bounds the time for a whole head, and the time in which nothing is taken. Who goes
    on with a body that was answered already may do so for `linger_s`.
    """

    stall_s = 60.0
    linger_s = 5.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # narrower there
        self._expect("head", self.stall_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect("head", self.stall_s)
        else:
            self._met("head")
        if self.conn.their_state is not h11.SEND_BODY:
            self._met("body's end")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            # Not at once, or the answer may be lost with what was sent in vain.
            self._expect("body's end", min(self.linger_s, self.stall_s))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect("taker", self.stall_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._met("taker")

    def connection_lost(self, exc: Exception | None) -> None:
        for what in list(self._timers):
            self._met(what)
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

    def _expect(self, what: str, within_s: float) -> None:
        if what not in self._timers and not self.transport.is_closing():
            self._timers[what] = self.loop.call_later(within_s, self._cut)

    def _met(self, what: str) -> None:
        timer = self._timers.pop(what, None)
        if timer is not None:
            timer.cancel()

    def _cut(self) -> None:
        # Not closed, which would wait for what is unsent: nobody takes it.
        self.transport.abort()


def connection_class(stall_s: float) -> type[Connection]:
    """For uvicorn, which makes connections itself."""
    return type("Connection", (Connection,), {"stall_s": stall_s})
