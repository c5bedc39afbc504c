"""`tools` and `tool_choice`: the functions that an answer may or must call; knows no template."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from jobs.formats import require_name
from jobs.values import (
    above_length,
    boolean,
    invalid_value,
    missing,
    unsupported,
    unsupported_value,
    wrong_type,
)

MAX_TOOLS: Final = 128
_NOTHING: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
_FUNCTION_KEYS: Final = ("name", "description", "parameters", "strict")
_MODES: Final = ("none", "auto", "required")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function. `parameters` is the JSON schema of its arguments, an object."""

    name: str
    parameters: Mapping[str, Any]
    definition: Mapping[str, Any]
    """As the client wrote it, for the chat template."""
    is_strict: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What an answer may call, and whether it has to. `offered` are told to the model, of which
    `callable` may be called.
    """

    offered: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    must_call: bool
    is_parallel: bool

    @property
    def is_constrained(self) -> bool:
        """Whether calls have to fit the functions' schemas, and not just should."""
        return self.must_call or any(tool.is_strict for tool in self.callable)


def parse_tool_use(given: Mapping[str, Any]) -> ToolUse | None:
    """None where nothing may be called. Raises InvalidRequestError."""
    tools = _tools(given.get("tools", []))
    is_parallel = boolean(given, "parallel_tool_calls") if "parallel_tool_calls" in given else True
    choice = given.get("tool_choice", "auto")
    if not tools:
        if choice not in ("none", "auto"):
            raise invalid_value("tool_choice", "it is only allowed when 'tools' are given")
        return None
    if choice == "none":
        return None
    named = _named(choice, tools)
    return ToolUse(
        offered=tools,
        callable=tools if named is None else (named,),
        must_call=named is not None or choice == "required",
        is_parallel=is_parallel and named is None,
    )


def _named(choice: object, tools: tuple[Tool, ...]) -> Tool | None:
    """The one that is chosen by name; None for a mode."""
    if isinstance(choice, str):
        if choice not in _MODES:
            raise unsupported_value("tool_choice", choice, _MODES)
        return None
    if not isinstance(choice, dict):
        raise wrong_type("tool_choice", "a string or an object", choice)
    if choice.get("type") != "function":
        raise unsupported("tool_choice.type", "is not 'function', the only type taken here")
    function = choice.get("function")
    if not isinstance(function, dict):
        raise wrong_type("tool_choice.function", "an object", function)
    name = require_name(function.get("name"), "tool_choice.function.name")
    found = next((tool for tool in tools if tool.name == name), None)
    if found is None:
        raise invalid_value("tool_choice.function.name", f"no tool is called '{name}'")
    return found


def _tools(given: object) -> tuple[Tool, ...]:
    if not isinstance(given, list):
        raise wrong_type("tools", "an array of objects", given)
    if len(given) > MAX_TOOLS:
        raise above_length("tools", MAX_TOOLS, len(given), kind="array")
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(given))
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            raise invalid_value(f"tools[{index}].function.name", f"'{tool.name}' is there twice")
        names.add(tool.name)
    return tools


def _tool(given: object, place: str) -> Tool:
    if not isinstance(given, dict):
        raise wrong_type(place, "an object", given)
    if given.get("type") is None:
        raise missing(f"{place}.type")
    if given["type"] != "function":
        raise unsupported(f"{place}.type", "is not 'function', the only type this server takes")
    function = given.get("function")
    if not isinstance(function, dict):
        raise wrong_type(f"{place}.function", "an object", function)
    for name in function:
        if name not in _FUNCTION_KEYS:
            raise unsupported(f"{place}.function.{name}", "is not supported by this server")
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise wrong_type(f"{place}.function.description", "a string", description)
    strict = function.get("strict") or False
    if not isinstance(strict, bool):
        raise wrong_type(f"{place}.function.strict", "a boolean", strict)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong_type(f"{place}.function.parameters", "an object", parameters)
    name = require_name(function.get("name"), f"{place}.function.name")
    schema = {"type": "object", **parameters} if parameters else _NOTHING
    told = {"name": name, "description": description, "parameters": parameters or _NOTHING}
    return Tool(
        name=name,
        parameters=schema,
        definition={"type": "function", "function": told},
        is_strict=strict,
    )
