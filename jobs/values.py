"""JSON values as a client sent them, and the contract's words where one is wrong; no endpoint."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from jobs.errors import InvalidRequestError

SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
_SHOWN_CHARACTERS: Final = 100
_TOO_LONG: Final[Mapping[str, str]] = {
    "string": "string_above_max_length",
    "array": "array_above_max_length",
}


def read_json(text: str) -> Any:
    """As bodies are read: no duplicate keys, and no numbers that are not finite.

    Raises ValueError, or RecursionError for what is too deep.
    """
    return _STRICT.decode(text)


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
        raise below_minimum(name, low, value)
    if high is not None and value > high:
        raise above_maximum(name, high, value)
    return value


def number(
    given: Mapping[str, Any], name: str, *, default: float, high: float, low: float = 0
) -> float:
    """A number from `low` to `high`."""
    value = given.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong_type(name, "a decimal", value)
    if value < low:
        raise below_minimum(name, low, value, kind="decimal")
    if value > high:
        raise above_maximum(name, high, value, kind="decimal")
    return float(value)


def unicode_text(text: str, param: str) -> str:
    """The text, if it can be UTF-8: JSON can escape half of a pair, no tokenizer can read one."""
    if SURROGATE.search(text):
        raise InvalidRequestError(
            f"Invalid '{param}': a lone surrogate is not a Unicode character.",
            param=param,
            code="invalid_value",
        )
    return text


def shown(text: str) -> str:
    """What a client sent as it is quoted back, never at any length."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def json_type(value: object) -> str:
    """The contract's words for a JSON value's type."""
    names = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string"}
    if value is None:
        return "null"
    return names.get(type(value), "an array" if isinstance(value, list) else "an object")


def missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
    )


def unknown(param: str) -> InvalidRequestError:
    name = shown(param)
    return InvalidRequestError(
        f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter"
    )


def wrong_type(param: str, expected: str, got: object) -> InvalidRequestError:
    name = shown(param)
    return InvalidRequestError(
        f"Invalid type for '{name}': expected {expected}, but got {json_type(got)} instead.",
        param=name,
        code="invalid_type",
    )


def unsupported(param: str, reason: str) -> InvalidRequestError:
    name = shown(param)
    return InvalidRequestError(
        f"Unsupported parameter: '{name}' {reason}.", param=name, code="unsupported_parameter"
    )


def below_minimum(
    param: str, minimum: float, got: object, *, kind: str = "integer"
) -> InvalidRequestError:
    return InvalidRequestError(
        f"Invalid '{param}': {kind} below minimum value. "
        f"Expected a value >= {minimum}, but got {shown(str(got))} instead.",
        param=param,
        code=f"{kind}_below_min_value",
    )


def above_maximum(
    param: str, maximum: float, got: object, *, kind: str = "integer"
) -> InvalidRequestError:
    return InvalidRequestError(
        f"Invalid '{param}': {kind} above maximum value. "
        f"Expected a value <= {maximum}, but got {shown(str(got))} instead.",
        param=param,
        code=f"{kind}_above_max_value",
    )


def above_length(
    param: str, maximum: int, got: int, *, kind: str = "string"
) -> InvalidRequestError:
    """Of a string or an array that is too long."""
    article = "a" if kind == "string" else "an"
    return InvalidRequestError(
        f"Invalid '{param}': {kind} too long. Expected {article} {kind} with maximum length "
        f"{maximum}, but got {article} {kind} with length {got} instead.",
        param=param,
        code=_TOO_LONG[kind],
    )


def invalid_value(param: str, fault: str) -> InvalidRequestError:
    return InvalidRequestError(f"Invalid '{param}': {fault}.", param=param, code="invalid_value")


def unsupported_value(param: str, got: object, supported: Sequence[str]) -> InvalidRequestError:
    names = ", ".join(f"'{name}'" for name in supported[:-1]) + f", and '{supported[-1]}'"
    quoted = f": '{shown(got)}'" if isinstance(got, str) else f" for '{param}'"
    return InvalidRequestError(
        f"Invalid value{quoted}. Supported values are: {names}.", param=param, code="invalid_value"
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number beyond what a float can hold")
    return number


_STRICT: Final = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite
)
