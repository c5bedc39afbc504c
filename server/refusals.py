"""The contract's wording of wrong parameters: what is refused here is decided elsewhere."""

from collections.abc import Sequence
from typing import Final

from jobs.errors import InvalidRequestError
from jobs.line import json_type

MIN_EXPIRY_S: Final = 3_600
MAX_EXPIRY_S: Final = 30 * 86_400
_SHOWN_CHARACTERS: Final = 100
_ANCHOR: Final = "created_at"


def missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
    )


def unknown(param: str) -> InvalidRequestError:
    shown = _shown(param)
    return InvalidRequestError(
        f"Unknown parameter: '{shown}'.", param=shown, code="unknown_parameter"
    )


def unsupported(value: str, param: str, supported: Sequence[str]) -> InvalidRequestError:
    quoted = [f"'{name}'" for name in supported]
    message = f"Invalid value: '{_shown(value)}'. Supported values are: {_listed(quoted)}."
    return InvalidRequestError(message, param=param, code="invalid_value")


def wrong_type(param: str, expected: str, got: object) -> InvalidRequestError:
    shown = _shown(param)
    message = f"Invalid type for '{shown}': expected {expected}, but got {json_type(got)} instead."
    return InvalidRequestError(message, param=shown, code="invalid_type")


def below_minimum(param: str, minimum: int, got: object) -> InvalidRequestError:
    return InvalidRequestError(
        f"Invalid '{param}': integer below minimum value. "
        f"Expected a value >= {minimum}, but got {_shown(str(got))} instead.",
        param=param,
        code="integer_below_min_value",
    )


def above_maximum(param: str, maximum: int, got: object) -> InvalidRequestError:
    return InvalidRequestError(
        f"Invalid '{param}': integer above maximum value. "
        f"Expected a value <= {maximum}, but got {_shown(str(got))} instead.",
        param=param,
        code="integer_above_max_value",
    )


def too_long(param: str, maximum: int, length: int) -> InvalidRequestError:
    shown = _shown(param)
    return InvalidRequestError(
        f"Invalid '{shown}': string too long. Expected a string with maximum length {maximum}, "
        f"but got a string with length {length} instead.",
        param=shown,
        code="string_above_max_length",
    )


def checked_expiry_s(anchor: object, seconds: object, param: str) -> int:
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
    if seconds < MIN_EXPIRY_S:
        raise below_minimum(f"{param}.seconds", MIN_EXPIRY_S, seconds)
    if seconds > MAX_EXPIRY_S:
        raise above_maximum(f"{param}.seconds", MAX_EXPIRY_S, seconds)
    return seconds


def _shown(text: str) -> str:
    # What a client sent is quoted back, but never at any length.
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _listed(quoted: Sequence[str]) -> str:
    if len(quoted) <= 2:
        return " and ".join(quoted)
    return f"{', '.join(quoted[:-1])}, and {quoted[-1]}"
