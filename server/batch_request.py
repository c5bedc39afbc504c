"""The body of `POST /v1/batches`: read, checked and refused in the contract's words; no records."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from jobs import values
from jobs.batch import BatchOptions, Endpoint, ExpiryPolicy
from jobs.errors import InvalidRequestError
from server import refusals
from server.batch_options import OPTION_SCHEMAS, parse_options
from server.json_body import check_keys, json_object

COMPLETION_WINDOWS_S: Final[Mapping[str, int]] = {"24h": 86_400}
MAX_METADATA_PAIRS: Final = 16
MAX_METADATA_KEY_CHARACTERS: Final = 64
MAX_METADATA_VALUE_CHARACTERS: Final = 512
_REQUIRED: Final = ("input_file_id", "endpoint", "completion_window")
_KNOWN: Final = (*_REQUIRED, "metadata", "output_expires_after", *OPTION_SCHEMAS)
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")

SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": list(_REQUIRED),
    "additionalProperties": False,
    "properties": {
        "input_file_id": {"type": "string", "minLength": 1},
        "endpoint": {"type": "string", "enum": [endpoint.value for endpoint in Endpoint]},
        "completion_window": {"type": "string", "enum": list(COMPLETION_WINDOWS_S)},
        "metadata": {
            "type": ["object", "null"],
            "maxProperties": MAX_METADATA_PAIRS,
            "propertyNames": {"maxLength": MAX_METADATA_KEY_CHARACTERS},
            "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE_CHARACTERS},
        },
        "output_expires_after": refusals.expiry_schema(),
        **OPTION_SCHEMAS,
    },
}
"""What `parse_batch_request` accepts, for the OpenAPI page."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """A wish for a batch, right in itself; whether its file is there is not known yet."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: str
    metadata: Mapping[str, str] | None
    output_expires_after: ExpiryPolicy | None
    options: BatchOptions = dataclasses.field(default_factory=BatchOptions)

    @property
    def digest(self) -> str:
        """Equal for equal wishes, however they were written down."""
        wish = dataclasses.asdict(self)
        if self.options == BatchOptions():
            del wish["options"]  # a plain wish is what it was before there were any
        return hashlib.sha256(json.dumps(wish, sort_keys=True).encode()).hexdigest()

    @property
    def lifetime_s(self) -> int:
        return self.options.expires_after_s or COMPLETION_WINDOWS_S[self.completion_window]


def parse_batch_request(raw: bytes) -> BatchRequest:
    """Raises InvalidRequestError for the first fault."""
    data = json_object(raw)
    check_keys(data, known=_KNOWN, required_texts=_REQUIRED)
    if not data["input_file_id"]:
        raise values.missing("input_file_id")
    if data["endpoint"] not in [endpoint.value for endpoint in Endpoint]:
        raise refusals.unsupported(data["endpoint"], "endpoint", list(Endpoint))
    window = data["completion_window"]
    if window not in COMPLETION_WINDOWS_S:
        raise refusals.unsupported(window, "completion_window", list(COMPLETION_WINDOWS_S))
    return BatchRequest(
        input_file_id=data["input_file_id"],
        endpoint=Endpoint(data["endpoint"]),
        completion_window=window,
        metadata=_metadata(data.get("metadata")),
        output_expires_after=_output_expiry(data.get("output_expires_after")),
        options=parse_options(data),
    )


def _metadata(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise values.wrong_type("metadata", "an object", value)
    if len(value) > MAX_METADATA_PAIRS:
        raise InvalidRequestError(
            f"Invalid 'metadata': too many properties. Expected an object with at most "
            f"{MAX_METADATA_PAIRS} properties, but got an object with {len(value)} properties "
            "instead.",
            param="metadata",
            code="object_above_max_properties",
        )
    for key, text in value.items():
        _check_pair(key, text)
    return value


def _check_pair(key: str, text: object) -> None:
    param = f"metadata.{key}"
    if len(key) > MAX_METADATA_KEY_CHARACTERS:
        raise refusals.too_long(param, MAX_METADATA_KEY_CHARACTERS, len(key))
    if not isinstance(text, str):
        raise values.wrong_type(param, "a string", text)
    if len(text) > MAX_METADATA_VALUE_CHARACTERS:
        raise refusals.too_long(param, MAX_METADATA_VALUE_CHARACTERS, len(text))
    if _SURROGATE.search(key) or _SURROGATE.search(text):
        # It could be kept, but never sent back: it has no UTF-8.
        message = "Invalid 'metadata': a lone surrogate is not a character."
        raise InvalidRequestError(message, param="metadata", code="invalid_value")


def _output_expiry(value: object) -> ExpiryPolicy | None:
    seconds = refusals.expiry_policy_s(value, "output_expires_after")
    return None if seconds is None else ExpiryPolicy(seconds=seconds)
