"""A multipart upload: read piece by piece, its fields checked; where its bytes go is not known."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from jobs import values
from jobs.errors import InvalidRequestError, TooLargeError
from jobs.file import BATCH_FILE_LIFETIME_S, UPLOAD_PURPOSES, Purpose
from server import refusals

MAX_UPLOAD_BYTES: Final = 512 * 2**20
"""For any purpose; files for batches have a limit of their own."""

_MAX_FIELD_BYTES: Final = 256
_HEAD_BYTES: Final = 2**20
_BOM: Final = b"\xef\xbb\xbf"
_ANCHOR: Final = "expires_after[anchor]"
_SECONDS: Final = "expires_after[seconds]"
_FIELDS: Final = ("purpose", _ANCHOR, _SECONDS)
_BAD_FORMAT: Final = "Invalid file format for Batch API. Must be .jsonl"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A finished, accepted upload. `lifetime_s` None: kept until deleted."""

    purpose: Purpose
    filename: str
    num_bytes: int
    lifetime_s: int | None


class UploadParser:
    """Feed it the body; take the file's bytes as they come; finish it for the checked fields."""

    def __init__(self, content_type: str | None, *, max_batch_bytes: int) -> None:
        """Raises InvalidRequestError for a body that is not a form."""
        self._max_batch_bytes = max_batch_bytes
        self._max_bytes = max(MAX_UPLOAD_BYTES, max_batch_bytes)
        self._fields: dict[str, bytes] = {}
        self._filename: str | None = None
        self._num_bytes = 0
        self._pending = bytearray()
        self._head = bytearray()
        self._name = ""
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._is_complete = False
        self._parser = self._make_parser(content_type)

    def _make_parser(self, content_type: str | None) -> MultipartParser:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise InvalidRequestError(
                "The body must be multipart/form-data with a boundary, and carry 'file' and "
                f"'purpose'; got content type '{content_type}'."
            )
        try:
            return MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise InvalidRequestError(f"The multipart body is malformed: {error}.") from None

    @property
    def num_pending_bytes(self) -> int:
        return len(self._pending)

    def feed(self, data: bytes) -> None:
        """Raises InvalidRequestError or TooLargeError as soon as either is certain."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequestError(f"The multipart body is malformed: {error}.") from None

    def take(self) -> bytes:
        """The file's bytes that came since the last call."""
        taken = bytes(self._pending)
        self._pending.clear()
        return taken

    def finish(self) -> Upload:
        """Raises InvalidRequestError. Call it when the body has ended."""
        if not self._is_complete:
            raise InvalidRequestError("The multipart body ends before its closing boundary.")
        purpose = self._purpose()
        if purpose is None:
            raise values.missing("purpose")
        if self._filename is None:
            raise values.missing("file")
        lifetime_s = self._lifetime_s(purpose)
        if purpose is Purpose.BATCH:
            self._check_batch_file()
        return Upload(
            purpose=purpose,
            filename=self._filename,
            num_bytes=self._num_bytes,
            lifetime_s=lifetime_s,
        )

    def _purpose(self) -> Purpose | None:
        if "purpose" not in self._fields:
            return None
        text = _text(self._fields["purpose"])
        if text not in [purpose.value for purpose in UPLOAD_PURPOSES]:
            raise refusals.unsupported(text, "purpose", list(UPLOAD_PURPOSES))
        return Purpose(text)

    def _lifetime_s(self, purpose: Purpose) -> int | None:
        fields: Mapping[str, str] = {name: _text(raw) for name, raw in self._fields.items()}
        anchor, written = fields.get(_ANCHOR), fields.get(_SECONDS)
        if anchor is None and written is None:
            return BATCH_FILE_LIFETIME_S if purpose is Purpose.BATCH else None
        seconds: object = written
        if written is not None and written.removeprefix("-").isdecimal() and written.isascii():
            seconds = int(written)  # form fields are text: what reads as a number is meant as one
        return refusals.checked_expiry_s(anchor, seconds, "expires_after")

    def _check_batch_file(self) -> None:
        if self._num_bytes > self._max_batch_bytes:
            raise InvalidRequestError(
                f"File is too large. It has {self._num_bytes} bytes; "
                f"the limit for purpose 'batch' is {self._max_batch_bytes} bytes."
            )
        if self._num_bytes == 0 or not _starts_with_json(bytes(self._head)):
            raise InvalidRequestError(_BAD_FORMAT)

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidRequestError("A part of the multipart body has no name.")
        name = _text(options[b"name"])
        if name in self._fields or (name == "file" and self._filename is not None):
            raise InvalidRequestError(f"Duplicate parameter: '{name}'.", param=name)
        if name == "file":
            self._filename = _text(options.get(b"filename", b"")) or "upload"
        elif name in _FIELDS:
            self._fields[name] = b""
        else:
            raise values.unknown(name)
        self._name = name

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._on_file_data(memoryview(data)[start:end])
            return
        self._fields[self._name] += data[start:end]
        if (size := len(self._fields[self._name])) > _MAX_FIELD_BYTES:
            raise refusals.too_long(self._name, _MAX_FIELD_BYTES, size)

    def _on_file_data(self, data: memoryview) -> None:
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise TooLargeError(f"File is too large. The limit is {self._max_bytes} bytes.")
        if len(self._head) < _HEAD_BYTES:
            self._head += data[: _HEAD_BYTES - len(self._head)]
        # A batch file over its limit is refused at the end; the rest is counted, to be named.
        is_over = self._num_bytes > self._max_batch_bytes
        if not (is_over and self._fields.get("purpose") == b"batch"):
            self._pending += data

    def _on_part_end(self) -> None:
        if self._name == "purpose":
            self._purpose()  # refused before the file comes, where it is sent first

    def _on_end(self) -> None:
        self._is_complete = True


def _starts_with_json(head: bytes) -> bool:
    """Whether the first line that is not blank is JSON, as far as `head` can tell."""
    lines = head.removeprefix(_BOM).split(b"\n")
    has_rest = len(head) == _HEAD_BYTES
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        if has_rest and index == len(lines) - 1:
            return True  # longer than the head: validation reads it whole
        try:
            json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            return False
        return True
    return True  # blank lines only: validation says so with its own code


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
