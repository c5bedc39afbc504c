"""JSON values of a request body, read in the wire contract's words; knows no endpoint."""

import re
from collections.abc import Mapping
from typing import Any, Final

from jobs.errors import InvalidRequestError
from jobs.line import json_type

_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")


def boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise wrong_type(name, "a boolean", value)
    return value


def integer(
    given: Mapping[str, Any], name: str, *, low: int, high: int | None = None
) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(name, "an integer", value)
    if value < low:
        raise _out_of_range(name, "integer", "min", limit=low, got=value)
    if high is not None and value > high:
        raise _out_of_range(name, "integer", "max", limit=high, got=value)
    return value


def number(given: Mapping[str, Any], name: str, *, default: float, high: int) -> float:
    """A number from 0 to `high`."""
    value = given.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong_type(name, "a decimal", value)
    if value < 0:
        raise _out_of_range(name, "decimal", "min", limit=0, got=value)
    if value > high:
        raise _out_of_range(name, "decimal", "max", limit=high, got=value)
    return float(value)


def unicode_text(text: str, param: str) -> str:
    """The text, if it can be UTF-8: JSON can escape half of a pair, no tokenizer can read one."""
    if _SURROGATE.search(text):
        raise InvalidRequestError(
            f"Invalid '{param}': a lone surrogate is not a Unicode character.",
            param=param,
            code="invalid_value",
        )
    return text


def missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
    )


def wrong_type(param: str, expected: str, got: object) -> InvalidRequestError:
    return InvalidRequestError(
        f"Invalid type for '{param}': expected {expected}, but got {json_type(got)} instead.",
        param=param,
        code="invalid_type",
    )


def unsupported(param: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Unsupported parameter: '{param}' {reason}.", param=param, code="unsupported_parameter"
    )


def _out_of_range(
    name: str, kind: str, bound: str, *, limit: int, got: float
) -> InvalidRequestError:
    words, sign = {"min": ("below minimum", ">="), "max": ("above maximum", "<=")}[bound]
    return InvalidRequestError(
        f"Invalid '{name}': {kind} {words} value. Expected a value {sign} {limit}, "
        f"but got {got} instead.",
        param=name,
        code=f"{kind}_{words.split()[0]}_{bound}_value",
    )
