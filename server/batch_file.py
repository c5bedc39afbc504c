"""Whether bytes may be a batch's input, seen as they pass: size and first line, no more."""

import json
from typing import Final

from jobs.errors import InvalidRequestError

_HEAD_BYTES: Final = 2**20
_BOM: Final = b"\xef\xbb\xbf"
_BAD_FORMAT: Final = "Invalid file format for Batch API. Must be .jsonl"


class BatchFileCheck:
    """Look at all bytes in order, then finish. Holds the first MiB."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._head = bytearray()

    def look(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if len(self._head) < _HEAD_BYTES:
            self._head += data[: _HEAD_BYTES - len(self._head)]

    def finish(self) -> None:
        """Raises InvalidRequestError."""
        if self._num_bytes > self._max_bytes:
            raise too_large(self._num_bytes, self._max_bytes)
        if self._num_bytes == 0 or not _starts_with_json(bytes(self._head)):
            raise InvalidRequestError(_BAD_FORMAT)


def too_large(num_bytes: int, max_bytes: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"File is too large. It has {num_bytes} bytes; "
        f"the limit for purpose 'batch' is {max_bytes} bytes."
    )


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
