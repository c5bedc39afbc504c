"""The form of `POST /v1/files`: its fields checked as they come; where its bytes go is not known."""

import dataclasses
from collections.abc import Mapping
from typing import Final

from jobs import values
from jobs.file import BATCH_FILE_LIFETIME_S, MAX_FILE_BYTES, UPLOAD_PURPOSES, Purpose
from server import refusals
from server.batch_file import BatchFileCheck
from server.multipart import FormParser, text_of

_ANCHOR: Final = "expires_after[anchor]"
_SECONDS: Final = "expires_after[seconds]"
FIELDS: Final = ("purpose", _ANCHOR, _SECONDS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedFile:
    """A finished, accepted form. `lifetime_s` None: kept until deleted."""

    purpose: Purpose
    filename: str
    num_bytes: int
    lifetime_s: int | None


class FileForm:
    """Feed it the body; take the file's bytes as they come; finish it for the checked fields."""

    def __init__(self, content_type: str | None, *, max_batch_bytes: int) -> None:
        """Raises InvalidRequestError for a body that is not a form."""
        self._form = FormParser(
            content_type,
            file_field="file",
            text_fields=FIELDS,
            max_file_bytes=max(MAX_FILE_BYTES, max_batch_bytes),
        )
        self._max_batch_bytes = max_batch_bytes
        self._check = BatchFileCheck(max_bytes=max_batch_bytes)
        self._pending = bytearray()

    @property
    def num_pending_bytes(self) -> int:
        return len(self._pending)

    def feed(self, data: bytes) -> None:
        """Raises InvalidRequestError or TooLargeError as soon as either is certain."""
        self._form.feed(data)
        self._purpose()  # refused before the file comes, where it is sent first
        taken = self._form.take()
        self._check.look(taken)
        # A batch file over its limit is refused at the end; the rest is counted, to be named.
        is_over = self._form.num_file_bytes > self._max_batch_bytes
        if not (is_over and self._form.fields.get("purpose") == b"batch"):
            self._pending += taken

    def take(self) -> bytes:
        """The file's bytes that came since the last call."""
        taken = bytes(self._pending)
        self._pending.clear()
        return taken

    def finish(self) -> ReceivedFile:
        """Raises InvalidRequestError. Call it when the body has ended."""
        self._form.finish()
        purpose = self._purpose()
        if purpose is None:
            raise values.missing("purpose")
        if self._form.filename is None:
            raise values.missing("file")
        lifetime_s = self._lifetime_s(purpose)
        if purpose is Purpose.BATCH:
            self._check.finish()
        return ReceivedFile(
            purpose=purpose,
            filename=refusals.checked_filename(self._form.filename, "file"),
            num_bytes=self._form.num_file_bytes,
            lifetime_s=lifetime_s,
        )

    def _purpose(self) -> Purpose | None:
        if "purpose" not in self._form.fields:
            return None
        text = text_of(self._form.fields["purpose"])
        if text not in [purpose.value for purpose in UPLOAD_PURPOSES]:
            raise refusals.unsupported(text, "purpose", list(UPLOAD_PURPOSES))
        return Purpose(text)

    def _lifetime_s(self, purpose: Purpose) -> int | None:
        fields: Mapping[str, str] = {name: text_of(raw) for name, raw in self._form.fields.items()}
        anchor, written = fields.get(_ANCHOR), fields.get(_SECONDS)
        if anchor is None and written is None:
            return BATCH_FILE_LIFETIME_S if purpose is Purpose.BATCH else None
        seconds: object = written
        if written is not None and written.removeprefix("-").isdecimal() and written.isascii():
            seconds = int(written)  # form fields are text: what reads as a number is meant as one
        return refusals.checked_expiry_s(anchor, seconds, "expires_after")
