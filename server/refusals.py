"""Refusals that only HTTP has, in the contract's words; those of any JSON are in `jobs.values`."""

from collections.abc import Sequence
from typing import Final

from jobs.errors import InvalidRequestError
from jobs.values import above_maximum, below_minimum, missing, shown, wrong_type

MIN_EXPIRY_S: Final = 3_600
MAX_EXPIRY_S: Final = 30 * 86_400
_ANCHOR: Final = "created_at"


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


def _listed(quoted: Sequence[str]) -> str:
    if len(quoted) <= 2:
        return " and ".join(quoted)
    return f"{', '.join(quoted[:-1])}, and {quoted[-1]}"
