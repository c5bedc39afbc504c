"""An input file as lines with their places, in bounded memory; knows bytes, not requests."""

import codecs
import dataclasses
from collections.abc import Iterator
from typing import BinaryIO, Final

_SKIP_BYTES: Final = 2**16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputLine:
    """A line that is not blank. `number` counts physical lines from 1; `raw` None: too long."""

    number: int
    offset_bytes: int
    raw: bytes | None


def input_lines(stream: BinaryIO, *, max_line_bytes: int) -> Iterator[InputLine]:
    """Lines from the stream's start, wherever it stands: a byte order mark is skipped, blank lines only counted."""
    limit_bytes = max_line_bytes + len(b"\r\n")
    offset_bytes = number = 0
    stream.seek(0)
    if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
        offset_bytes = len(codecs.BOM_UTF8)
    stream.seek(offset_bytes)
    while raw := stream.readline(limit_bytes):
        number += 1
        content = raw.rstrip(b"\r\n")
        is_cut = len(raw) == limit_bytes and not raw.endswith(b"\n")
        if is_cut or len(content) > max_line_bytes:
            yield InputLine(number=number, offset_bytes=offset_bytes, raw=None)
            _skip_rest(stream, raw)
        elif content.strip():
            yield InputLine(number=number, offset_bytes=offset_bytes, raw=content)
        offset_bytes = stream.tell()


def _skip_rest(stream: BinaryIO, raw: bytes) -> None:
    while raw and not raw.endswith(b"\n"):
        raw = stream.readline(_SKIP_BYTES)
