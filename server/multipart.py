"""A multipart form with one file: its fields and the file's bytes, piece by piece, within bounds.

Knows which names a form may have; what they mean is known to who asks.
"""

from collections.abc import Collection, Mapping
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from jobs import values
from jobs.errors import InvalidRequestError, TooLargeError
from server import refusals

_MAX_FIELD_BYTES: Final = 256
_MAX_FRAME_BYTES: Final = 64 * 1024
"""Boundaries, part headers and fields together: far more than a form with a few fields needs."""


class FormParser:
    """Feed it the body; take the file's bytes as they come; finish it when the body has ended."""

    def __init__(
        self,
        content_type: str | None,
        *,
        file_field: str,
        text_fields: Collection[str],
        max_file_bytes: int,
    ) -> None:
        """Raises InvalidRequestError for a body that is not a form."""
        self._file_field = file_field
        self._text_fields = text_fields
        self._max_file_bytes = max_file_bytes
        self._fields: dict[str, bytes] = {}
        self._filename: str | None = None
        self._num_fed_bytes = self._num_file_bytes = 0
        self._pending = bytearray()
        self._name = ""
        self._value = bytearray()
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._is_complete = False
        self._parser = self._make_parser(content_type)

    def _make_parser(self, content_type: str | None) -> MultipartParser:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            raise refusals.unsupported_content_type(content_type, "multipart/form-data")
        if not options.get(b"boundary"):
            raise InvalidRequestError(f"The content type '{content_type}' names no boundary.")
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
            raise _malformed(error) from None

    @property
    def fields(self) -> Mapping[str, bytes]:
        """The text fields that came to their end."""
        return self._fields

    @property
    def filename(self) -> str | None:
        """None: no file has begun."""
        return self._filename

    @property
    def num_pending_bytes(self) -> int:
        return len(self._pending)

    @property
    def num_file_bytes(self) -> int:
        return self._num_file_bytes

    def feed(self, data: bytes) -> None:
        """Raises InvalidRequestError or TooLargeError as soon as either is certain."""
        self._num_fed_bytes += len(data)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(error) from None
        # What is no file's: no form is endless because its fields, headers or its end are.
        num_frame_bytes = self._num_fed_bytes - self._num_file_bytes
        if num_frame_bytes - len(data) > _MAX_FRAME_BYTES:
            raise TooLargeError(
                f"The multipart body has more than {_MAX_FRAME_BYTES} bytes beside its file."
            )

    def take(self) -> bytes:
        """The file's bytes that came since the last call."""
        taken = bytes(self._pending)
        self._pending.clear()
        return taken

    def finish(self) -> None:
        """Raises InvalidRequestError if the form is not whole. Call it when the body has ended."""
        if not self._is_complete:
            raise InvalidRequestError("The multipart body ends before its closing boundary.")

    def _on_part_begin(self) -> None:
        self._disposition = b""
        self._value.clear()

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
        name = text_of(options[b"name"])
        if name in self._fields or (name == self._file_field and self._filename is not None):
            raise InvalidRequestError(f"Duplicate parameter: '{name}'.", param=name)
        if name == self._file_field:
            self._filename = text_of(options.get(b"filename", b"")) or "upload"
        elif name not in self._text_fields:
            raise values.unknown(name)
        self._name = name

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name != self._file_field:
            self._value += data[start:end]
            if (size := len(self._value)) > _MAX_FIELD_BYTES:
                raise refusals.too_long(self._name, _MAX_FIELD_BYTES, size)
            return
        self._num_file_bytes += end - start
        if self._num_file_bytes > self._max_file_bytes:
            raise TooLargeError(f"File is too large. The limit is {self._max_file_bytes} bytes.")
        self._pending += memoryview(data)[start:end]

    def _on_part_end(self) -> None:
        if self._name != self._file_field:
            self._fields[self._name] = bytes(self._value)

    def _on_end(self) -> None:
        self._is_complete = True


def text_of(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _malformed(error: FormParserError) -> InvalidRequestError:
    return InvalidRequestError(f"The multipart body is malformed: {error}.")
