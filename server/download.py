"""A file's bytes on their way out: which range was asked for, the headers, the stream."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import BinaryIO, Final
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from jobs.file import File, Purpose
from jobs.stores.base import FileStore
from server.errors import RangeError

_CHUNK_BYTES: Final = 256 * 1024
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_JSONL: Final = (Purpose.BATCH, Purpose.BATCH_OUTPUT)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    start: int
    num_bytes: int


def content_response(file: File, files: FileStore, headers: Headers) -> Response:
    """The bytes, or the asked part of them. Raises NotFoundError and RangeError, before any byte
    is sent; the blob stays readable to the end even if it is deleted meanwhile.
    """
    with contextlib.ExitStack() as opened:
        stream = opened.enter_context(files.read(file.id))
        size = stream.seek(0, os.SEEK_END)
        etag = f'"{file.id}"'  # a blob never changes
        span = None
        if headers.get("if-range", etag) == etag:
            span = _asked_span(headers.get("range"), size)
        given = span or _Span(start=0, num_bytes=size)
        response_headers = {
            "content-length": str(given.num_bytes),
            "content-disposition": _disposition(file.filename),
            "accept-ranges": "bytes",
            "etag": etag,
        }
        if span is not None:
            last = span.start + span.num_bytes - 1
            response_headers["content-range"] = f"bytes {span.start}-{last}/{size}"
        return StreamingResponse(
            _chunks(opened.pop_all(), stream, given),
            status_code=200 if span is None else 206,
            headers=response_headers,
            media_type="application/jsonl"
            if file.purpose in _JSONL
            else "application/octet-stream",
        )


def _asked_span(wanted: str | None, size: int) -> _Span | None:
    """The one range asked for. None for none, and for forms that may be ignored."""
    match = _RANGE.fullmatch(wanted or "")
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), size if match[2] == "" else int(match[2]) + 1
        if match[2] != "" and end <= start:
            return None  # malformed: as if it were not there
    if start >= size:
        message = f"The range '{wanted}' starts beyond the file, which has {size} bytes."
        raise RangeError(message, num_bytes=size)
    return _Span(start=start, num_bytes=min(end, size) - start)


def _chunks(opened: contextlib.ExitStack, stream: BinaryIO, span: _Span) -> Iterator[bytes]:
    with opened:
        stream.seek(span.start)
        left = span.num_bytes
        while left and (chunk := stream.read(min(left, _CHUNK_BYTES))):
            left -= len(chunk)
            yield chunk


def _disposition(filename: str) -> str:
    plain = re.sub(r'[^\x20-\x7e]|["\\]', "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
