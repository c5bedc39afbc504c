"""The messages of a chat: roles and text, in the wire's words; no chat template."""

import json
from collections.abc import Mapping
from typing import Any, Final

from jobs.values import (
    invalid_value,
    missing,
    unicode_text,
    unsupported,
    unsupported_value,
    wrong_type,
)

ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
_STRINGS: Final = ("name", "tool_call_id")
_TEXT_PARTS: Final[Mapping[str, str]] = {"text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the key it is under."""


def parse_messages(messages: object, param: str = "messages") -> tuple[Mapping[str, Any], ...]:
    """As a chat template takes them: content is one string, arguments of tool calls are objects."""
    if not isinstance(messages, list):
        raise wrong_type(param, "an array of objects", messages)
    return tuple(_message(message, f"{param}[{at}]") for at, message in enumerate(messages))


def _message(message: object, place: str) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise wrong_type(place, "an object", message)
    found: dict[str, Any] = {"role": _role(message.get("role"), f"{place}.role")}
    calls = message.get("tool_calls")
    if calls and found["role"] == "assistant":
        found["tool_calls"] = _tool_calls(calls, f"{place}.tool_calls")
    said = message.get("content")
    if said is None and isinstance(message.get("refusal"), str):
        said = message["refusal"]
    if said is None and "tool_calls" in found:
        said = ""
    found["content"] = _text_of(said, f"{place}.content")
    _require_known(message, place, found)
    for name in _STRINGS:
        value = message.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise wrong_type(f"{place}.{name}", "a string", value)
            found[name] = unicode_text(value, f"{place}.{name}")
    if found["role"] == "tool" and "tool_call_id" not in found:
        raise missing(f"{place}.tool_call_id")
    return found


def _require_known(message: Mapping[str, Any], place: str, found: Mapping[str, Any]) -> None:
    """What is not taken is refused by its name, unless it holds nothing."""
    for name, value in message.items():
        is_said = name == "refusal" and found["role"] == "assistant"
        if name in found or name in _STRINGS or is_said or value in (None, []):
            continue
        raise unsupported(f"{place}.{name}", "is not supported by this server")


def _role(role: object, place: str) -> str:
    if role is None:
        raise missing(place)
    if not isinstance(role, str):
        raise wrong_type(place, "a string", role)
    if role not in ROLES:
        raise unsupported_value(place, role, ROLES)
    return role


def _text_of(content: object, place: str) -> str:
    if isinstance(content, str):
        return unicode_text(content, place)
    if content is None:
        raise missing(place)
    if not isinstance(content, list):
        raise wrong_type(place, "a string or an array of text parts", content)
    return "".join(_text_part(part, f"{place}[{index}]") for index, part in enumerate(content))


def _text_part(part: object, place: str) -> str:
    if not isinstance(part, dict):
        raise wrong_type(place, "an object", part)
    kind = part.get("type")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise unsupported(f"{place}.type", f"is {_kind_shown(kind)}; this server takes text only")
    if not isinstance(part.get(key), str):
        raise wrong_type(f"{place}.{key}", "a string", part.get(key))
    return unicode_text(part[key], f"{place}.{key}")


def _kind_shown(kind: object) -> str:
    known = ("image_url", "input_audio", "file")
    return f"'{kind}'" if kind in known else "not 'text'"


def _tool_calls(calls: object, place: str) -> list[Mapping[str, Any]]:
    if not isinstance(calls, list):
        raise wrong_type(place, "an array of objects", calls)
    return [_tool_call(call, f"{place}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, place: str) -> Mapping[str, Any]:
    if not isinstance(call, dict):
        raise wrong_type(place, "an object", call)
    if call.get("type", "function") != "function":
        raise unsupported(f"{place}.type", "is not 'function', the only type this server takes")
    function = call.get("function")
    if not isinstance(function, dict):
        raise wrong_type(f"{place}.function", "an object", function)
    for name in ("name", "arguments"):
        if not isinstance(function.get(name), str):
            raise wrong_type(f"{place}.function.{name}", "a string", function.get(name))
    arguments = _arguments(function["arguments"], f"{place}.function.arguments")
    name = unicode_text(function["name"], f"{place}.function.name")
    found = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if isinstance(call.get("id"), str):
        found["id"] = unicode_text(call["id"], f"{place}.id")
    return found


def _arguments(text: str, place: str) -> Mapping[str, Any]:
    """An object: templates write it as JSON themselves."""
    try:
        found = json.loads(unicode_text(text, place) or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid_value(place, "expected a JSON object written as a string")
    return found
