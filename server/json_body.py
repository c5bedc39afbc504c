"""A JSON body as an object of known keys, or its refusal in the contract's words."""

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from jobs import values
from jobs.errors import InvalidRequestError


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def json_object(raw: bytes, *, read: Callable[[str], Any] = _read) -> dict[str, Any]:
    """Raises InvalidRequestError; `read` raises ValueError or RecursionError."""
    try:
        data = read(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        message = "We could not parse the JSON body of your request."
        raise InvalidRequestError(message) from None
    if not isinstance(data, dict):
        raise values.wrong_type("body", "an object", data)
    return data


def check_keys(
    data: dict[str, Any], *, known: Collection[str], required_texts: Sequence[str]
) -> None:
    """No key that is not known, and a string, not empty, for each required one."""
    for key in data:
        if key not in known:
            raise values.unknown(key)
    for key in required_texts:
        if key not in data:
            raise values.missing(key)
        if not isinstance(data[key], str):
            raise values.wrong_type(key, "a string", data[key])
        values.unicode_text(data[key], key)
