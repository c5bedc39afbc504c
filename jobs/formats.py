"""`response_format`: the JSON schema that an answer has to fit, if there is one; no grammar."""

import re
from collections.abc import Mapping
from typing import Any, Final

from jobs.values import (
    above_length,
    invalid_value,
    missing,
    unsupported,
    unsupported_value,
    wrong_type,
)

_MAX_NAME_CHARACTERS: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}
_TYPES: Final = ("text", "json_object", "json_schema")
_KEYS: Final = ("name", "description", "schema", "strict")


def parse_format(given: object, *, place: str = "response_format") -> Mapping[str, Any] | None:
    """The schema; None for plain text. Strict or not, it is kept to."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise wrong_type(place, "an object", given)
    kind = given.get("type")
    if kind not in _TYPES:
        raise unsupported_value(f"{place}.type", kind, _TYPES)
    for name in given:
        if name != "type" and not (kind == "json_schema" and name == "json_schema"):
            raise unsupported(f"{place}.{name}", f"does not go with type '{kind}'")
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    return _schema(given.get("json_schema"), f"{place}.json_schema")


def parse_flat_format(given: object) -> Mapping[str, Any] | None:
    """Likewise of `text.format`, where a schema's fields lie beside its type."""
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return parse_format(given, place="text.format")
    return _schema({name: given[name] for name in given if name != "type"}, "text.format")


def _schema(given: object, place: str) -> Mapping[str, Any]:
    if given is None:
        raise missing(place)
    if not isinstance(given, dict):
        raise wrong_type(place, "an object", given)
    for name in given:
        if name not in _KEYS:
            raise unsupported(f"{place}.{name}", "is not supported by this server")
    require_name(given.get("name"), f"{place}.name")
    if not isinstance(given.get("strict"), bool | None):
        raise wrong_type(f"{place}.strict", "a boolean", given["strict"])
    if not isinstance(given.get("description"), str | None):
        raise wrong_type(f"{place}.description", "a string", given["description"])
    schema = given.get("schema")
    if schema is None:
        return {}
    if not isinstance(schema, dict):
        raise wrong_type(f"{place}.schema", "an object", schema)
    return schema


def require_name(name: object, place: str) -> str:
    """A name as schemas and functions have them. Raises InvalidRequestError."""
    if name is None:
        raise missing(place)
    if not isinstance(name, str):
        raise wrong_type(place, "a string", name)
    if len(name) > _MAX_NAME_CHARACTERS:
        raise above_length(place, _MAX_NAME_CHARACTERS, len(name))
    if not _NAME.fullmatch(name):
        raise invalid_value(place, "expected letters, digits, underscores and dashes only")
    return name
