"""Refusals that only HTTP has, in the contract's words; those of any JSON are in `jobs.values`."""

import re
from collections.abc import Sequence
from typing import Any, Final

from jobs.errors import InvalidRequestError
from jobs.values import above_maximum, below_minimum, missing, shown, unknown, wrong_type

MIN_EXPIRY_S: Final = 3_600
MAX_EXPIRY_S: Final = 30 * 86_400
MAX_FILENAME_CHARACTERS: Final = 255
_ANCHOR: Final = "created_at"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def expiry_schema(*, minimum: int = MIN_EXPIRY_S, maximum: int = MAX_EXPIRY_S) -> dict[str, Any]:
    """What `expiry_policy_s` accepts, for the OpenAPI page."""
    return {
        "type": ["object", "null"],
        "required": ["anchor", "seconds"],
        "additionalProperties": False,
        "properties": {
            "anchor": {"type": "string", "enum": [_ANCHOR]},
            "seconds": {"type": "integer", "minimum": minimum, "maximum": maximum},
        },
    }


class ContentTypeError(InvalidRequestError):
    """The body is of a kind that the endpoint does not read."""


def unsupported_content_type(content_type: str | None, expected: str) -> ContentTypeError:
    given = "none" if content_type is None else f"'{shown(content_type)}'"
    return ContentTypeError(
        f"Unsupported content type: this API method only accepts '{expected}' requests, "
        f"but the header Content-Type is {given}.",
        code="unsupported_content_type",
    )


def unsupported(value: str, param: str, supported: Sequence[str]) -> InvalidRequestError:
    quoted = [f"'{name}'" for name in supported]
    message = f"Invalid value: '{shown(value)}'. Supported values are: {_listed(quoted)}."
    return InvalidRequestError(message, param=param, code="invalid_value")


def too_long(param: str, maximum: int, length: int) -> InvalidRequestError:
    name = shown(param)
    return InvalidRequestError(
        f"Invalid '{name}': string too long. Expected a string with maximum length {maximum}, "
        f"but got a string with length {length} instead.",
        param=name,
        code="string_above_max_length",
    )


def checked_filename(filename: str, param: str) -> str:
    """The name as it was sent; nothing of it ever reaches the file system."""
    if len(filename) > MAX_FILENAME_CHARACTERS:
        raise too_long(param, MAX_FILENAME_CHARACTERS, len(filename))
    if _CONTROL.search(filename):
        message = f"Invalid '{param}': control characters are not allowed in a file name."
        raise InvalidRequestError(message, param=param, code="invalid_value")
    return filename


def checked_expiry_s(
    anchor: object,
    seconds: object,
    param: str,
    *,
    minimum: int = MIN_EXPIRY_S,
    maximum: int = MAX_EXPIRY_S,
) -> int:
    """The seconds of an expiry policy of which at least one half was given."""
    if anchor is None:
        raise missing(f"{param}.anchor")
    if anchor != _ANCHOR:
        if not isinstance(anchor, str):
            raise wrong_type(f"{param}.anchor", "a string", anchor)
        raise unsupported(anchor, f"{param}.anchor", [_ANCHOR])
    if seconds is None:
        raise missing(f"{param}.seconds")
    if not isinstance(seconds, int) or isinstance(seconds, bool):
        raise wrong_type(f"{param}.seconds", "an integer", seconds)
    if seconds < minimum:
        raise below_minimum(f"{param}.seconds", minimum, seconds)
    if seconds > maximum:
        raise above_maximum(f"{param}.seconds", maximum, seconds)
    return seconds


def expiry_policy_s(
    value: object, param: str, *, minimum: int = MIN_EXPIRY_S, maximum: int = MAX_EXPIRY_S
) -> int | None:
    """The seconds of a JSON expiry policy; None for none."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong_type(param, "an object", value)
    for key in value:
        if key not in ("anchor", "seconds"):
            raise unknown(f"{param}.{key}")
    return checked_expiry_s(
        value.get("anchor"), value.get("seconds"), param, minimum=minimum, maximum=maximum
    )


def _listed(quoted: Sequence[str]) -> str:
    if len(quoted) <= 2:
        return " and ".join(quoted)
    return f"{', '.join(quoted[:-1])}, and {quoted[-1]}"
