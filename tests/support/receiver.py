"""Somebody who is told of things over HTTP, and answers as a test wants."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """Answers with `statuses` in turn, the last one for ever. `is_deaf`: takes all, answers nothing."""

    def __init__(self, *, statuses: tuple[int, ...], location: str, is_deaf: bool) -> None:
        self.heard: list[Heard] = []
        self.released = threading.Event()
        self.url = ""
        self._statuses = statuses
        self._location = location
        self._is_deaf = is_deaf
        self._lock = threading.Lock()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("content-length", "0")))
        headers = {name.lower(): value for name, value in request.headers.items()}
        with self._lock:
            self.heard.append(Heard(path=request.path, headers=headers, body=body))
            status = self._statuses[min(len(self.heard), len(self._statuses)) - 1]
        if self._is_deaf:
            self.released.wait()
            return
        request.send_response_only(status)
        if self._location:
            request.send_header("location", self._location)
        request.send_header("content-length", "0")
        request.end_headers()


@contextlib.contextmanager
def receiving(
    *, statuses: tuple[int, ...] = (200,), location: str = "", is_deaf: bool = False
) -> Iterator[Receiver]:
    """On a loopback port, in threads of the test's process."""
    receiver = Receiver(statuses=statuses, location=location, is_deaf=is_deaf)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            receiver.answer(self)

        def do_POST(self) -> None:
            receiver.answer(self)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """Quietly."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_address[1]}/hook?of=tests"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield receiver
        finally:
            receiver.released.set()
            server.shutdown()
            thread.join()
