"""The bodies of `/v1/uploads`: read, checked and refused in the contract's words; no records."""

import dataclasses
import re
from typing import Any, Final

from jobs import values
from jobs.errors import InvalidRequestError
from jobs.file import BATCH_FILE_LIFETIME_S, Purpose
from jobs.upload import MAX_PARTS, MAX_UPLOAD_BYTES, PURPOSES
from server import refusals
from server.batch_file import too_large
from server.json_body import check_keys, json_object

_TEXTS: Final = ("filename", "purpose", "mime_type")
_KNOWN: Final = (*_TEXTS, "bytes", "expires_after")
_MAX_MIME_TYPE_CHARACTERS: Final = 255
_MD5: Final = re.compile(r"[0-9a-fA-F]{32}")

UPLOAD_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": [*_TEXTS, "bytes"],
    "additionalProperties": False,
    "properties": {
        "filename": {
            "type": "string",
            "minLength": 1,
            "maxLength": refusals.MAX_FILENAME_CHARACTERS,
        },
        "purpose": {"type": "string", "enum": [purpose.value for purpose in PURPOSES]},
        "bytes": {"type": "integer", "minimum": 1, "maximum": MAX_UPLOAD_BYTES},
        "mime_type": {"type": "string", "maxLength": _MAX_MIME_TYPE_CHARACTERS},
        "expires_after": refusals.expiry_schema(),
    },
}
COMPLETION_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["part_ids"],
    "additionalProperties": False,
    "properties": {
        "part_ids": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_PARTS,
            "uniqueItems": True,
            "items": {"type": "string"},
        },
        "md5": {"type": ["string", "null"], "pattern": f"^{_MD5.pattern}$"},
    },
}
"""What `parse_upload_request` and `parse_completion` accept, for the OpenAPI page."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UploadRequest:
    filename: str
    purpose: Purpose
    mime_type: str
    num_bytes: int
    file_lifetime_s: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Which parts make the file, in its order. `md5` in small hexadecimal digits."""

    part_ids: tuple[str, ...]
    md5: str | None


def parse_upload_request(raw: bytes, *, max_batch_bytes: int) -> UploadRequest:
    """Raises InvalidRequestError for the first fault."""
    data = json_object(raw)
    check_keys(data, known=_KNOWN, required_texts=_TEXTS)
    if data["purpose"] not in [purpose.value for purpose in PURPOSES]:
        raise refusals.unsupported(data["purpose"], "purpose", list(PURPOSES))
    if len(data["mime_type"]) > _MAX_MIME_TYPE_CHARACTERS:
        raise refusals.too_long("mime_type", _MAX_MIME_TYPE_CHARACTERS, len(data["mime_type"]))
    purpose = Purpose(data["purpose"])
    num_bytes = values.integer(data, "bytes", low=1, high=MAX_UPLOAD_BYTES)
    if num_bytes is None:
        raise values.missing("bytes")
    if purpose is Purpose.BATCH and num_bytes > max_batch_bytes:
        raise too_large(num_bytes, max_batch_bytes)
    lifetime_s = refusals.expiry_policy_s(data.get("expires_after"), "expires_after")
    if lifetime_s is None and purpose is Purpose.BATCH:
        lifetime_s = BATCH_FILE_LIFETIME_S
    if not data["filename"]:
        raise values.missing("filename")
    return UploadRequest(
        filename=refusals.checked_filename(data["filename"], "filename"),
        purpose=purpose,
        mime_type=data["mime_type"],
        num_bytes=num_bytes,
        file_lifetime_s=lifetime_s,
    )


def parse_completion(raw: bytes) -> Completion:
    """Raises InvalidRequestError for the first fault."""
    data = json_object(raw)
    check_keys(data, known=("part_ids", "md5"), required_texts=())
    if "part_ids" not in data:
        raise values.missing("part_ids")
    part_ids, md5 = data["part_ids"], data.get("md5")
    if not isinstance(part_ids, list):
        raise values.wrong_type("part_ids", "an array", part_ids)
    for index, part_id in enumerate(part_ids):
        if not isinstance(part_id, str):
            raise values.wrong_type(f"part_ids[{index}]", "a string", part_id)
    if not part_ids:
        raise _invalid_parts("it must name at least one part")
    if len(set(part_ids)) != len(part_ids):
        raise _invalid_parts("a part is named twice")
    if md5 is not None and not isinstance(md5, str):
        raise values.wrong_type("md5", "a string", md5)
    if md5 is not None and _MD5.fullmatch(md5) is None:
        message = "Invalid 'md5': expected 32 hexadecimal digits."
        raise InvalidRequestError(message, param="md5", code="invalid_value")
    return Completion(part_ids=tuple(part_ids), md5=None if md5 is None else md5.lower())


def _invalid_parts(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Invalid 'part_ids': {reason}.", param="part_ids", code="invalid_value"
    )
