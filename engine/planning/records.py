"""The planner's values as JSON and back, refusing by the name of the field; knows no single one."""

import collections.abc
import contextlib
import dataclasses
import enum
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from engine.errors import RecordError

_Value = TypeVar("_Value")


def to_json(value: Any) -> Any:
    """Of dataclasses, enums, tuples and mappings: plain JSON values, keys in the fields' order."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value


def from_json(kind: type[_Value], data: Any) -> _Value:
    """The value of dataclass `kind` that `to_json` made `data` of. Raises RecordError."""
    made: _Value = _read(kind, data, kind.__name__)
    return made


def write_record(path: Path, value: Any) -> None:
    """Raises RecordError."""
    text = json.dumps(to_json(value), indent=2, allow_nan=False)
    write_text(path, f"{text}\n")


def read_record(kind: type[_Value], path: Path) -> _Value:
    """Raises RecordError that names the file, the field and what is there."""
    try:
        data = json.loads(read_text(path))
    except ValueError as error:
        raise RecordError(f"{path} is not JSON: {error}") from error
    try:
        return from_json(kind, data)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half of it. Raises RecordError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RecordError(f"{path} cannot be written: {error.strerror}") from error


def read_text(path: Path) -> str:
    """Raises RecordError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error


def _read(kind: Any, data: Any, name: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in {types.UnionType, typing.Union}:
        return _read_optional(kind, data, name)
    if origin is tuple:
        return _read_tuple(typing.get_args(kind), data, name)
    if origin in {dict, Mapping, collections.abc.Mapping}:
        return _read_mapping(typing.get_args(kind), data, name)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, name)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _read_enum(kind, data, name)
    what, reads = _PLAIN[kind]
    if not reads(data):
        raise _refusal(name, what, data)
    return float(data) if kind is float else data


def _read_optional(kind: Any, data: Any, name: str) -> Any:
    kinds = [each for each in typing.get_args(kind) if each is not type(None)]
    assert len(kinds) == 1, "a field has one kind, or one and None"
    return None if data is None else _read(kinds[0], data, name)


def _read_tuple(kinds: tuple[Any, ...], data: Any, name: str) -> Any:
    if not isinstance(data, list):
        raise _refusal(name, "a list", data)
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(data)
    if len(data) != len(kinds):
        raise RecordError(f"{name} has {len(kinds)} items, not {len(data)}")
    pairs = zip(kinds, data, strict=True)
    return tuple(_read(kind, item, f"{name}[{at}]") for at, (kind, item) in enumerate(pairs))


def _read_mapping(kinds: tuple[Any, ...], data: Any, name: str) -> Any:
    if not isinstance(data, dict):
        raise _refusal(name, "an object", data)
    key_kind, kind = kinds
    return {
        _read(key_kind, key, f"a key of {name}"): _read(kind, item, f"{name}.{key}")
        for key, item in data.items()
    }


def _read_dataclass(kind: Any, data: Any, name: str) -> Any:
    if not isinstance(data, dict):
        raise _refusal(name, "an object", data)
    kinds = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    if unknown := sorted(data.keys() - fields.keys()):
        raise RecordError(f"{name} has no field {unknown[0]!r}; it has {', '.join(fields)}")
    lacking = [
        each.name
        for each in fields.values()
        if each.default is each.default_factory is dataclasses.MISSING and each.name not in data
    ]
    if lacking:
        raise RecordError(f"{name} lacks {', '.join(lacking)}")
    return kind(**{each: _read(kinds[each], data[each], f"{name}.{each}") for each in data})


def _read_enum(kind: type[enum.Enum], data: Any, name: str) -> enum.Enum:
    values = [member.value for member in kind]
    if data not in values:
        raise _refusal(name, f"one of {', '.join(map(str, values))}", data)
    return kind(data)


def _refusal(name: str, what: str, data: Any) -> RecordError:
    return RecordError(f"{name} is {what}, not {json.dumps(data)[:80]}")


def _is_number(data: Any) -> bool:
    return isinstance(data, int | float) and not isinstance(data, bool) and math.isfinite(data)


_PLAIN: Final[Mapping[Any, tuple[str, Callable[[Any], bool]]]] = types.MappingProxyType(
    {
        int: ("a whole number", lambda data: isinstance(data, int) and not isinstance(data, bool)),
        float: ("a number", _is_number),
        bool: ("true or false", lambda data: isinstance(data, bool)),
        str: ("a text", lambda data: isinstance(data, str)),
    }
)
