"""How a family of models writes calls of functions: the grammar that makes it, the text that is read.

Knows no one family. Grammars are in llguidance's Lark; what they call `head` opens a call, `body` is
the rest of it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from engine.grammar import embedded
from jobs.answers import ToolCall
from jobs.tools import ToolUse

SpecialToken = Callable[[str], int | None]
"""The id of a text that is a special token of the model; None for any other text."""

_TEXT: Final = r"TEXT: /(.|\n)*/"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Calls as rules. `body` may use the rule `call`; of heads and bodies there may be several in
    a row, with `separator` between, where `repeats` is set. Without a head a body is told from
    text by its first character.
    """

    head: str
    body: str
    rules: tuple[str, ...]
    repeats: bool = True
    separator: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer taken apart."""

    text: str
    calls: tuple[ToolCall, ...]


class Family(Protocol):
    """One way of writing calls."""

    @property
    def id_characters(self) -> int | None:
        """How long the ids of calls are that its templates take; None for any."""

    def fits(self, template: str) -> bool:
        """Whether the chat template is of this family."""

    def form(self, use: ToolUse, template: str, special: SpecialToken) -> Form: ...

    def read(self, text: str) -> Said:
        """Of a text with its special tokens left in. What is no whole call stays text."""


def grammar(form: Form, use: ToolUse, special: SpecialToken) -> str:
    """All of an answer: calls alone where it must call, text with calls in it where it may."""
    rules = [*form.rules, f"body: {form.body}"]
    if use.must_call:
        head = atom(form.head, special) if form.head else ""
        separator = json.dumps(form.separator) if form.separator else ""
        more = f" ({separator} {head} body)*" if form.repeats and use.is_parallel else ""
        return "\n".join([f"start: {head} body{more}", *rules, ""])
    many = "*" if form.repeats and use.is_parallel else "?"
    if not form.head:
        return "\n".join(["start: body | OTHER", r"OTHER: /([^{](.|\n)*)?/", *rules, ""])
    if special(form.head) is not None:
        opened = [f"opened: TEXT {atom(form.head, special)} body"]
    else:
        opened = ["opened: head body", f"head[lazy]: TEXT {json.dumps(form.head)}"]
    return "\n".join([f"start: opened{many} TEXT", *opened, _TEXT, *rules, ""])


def atom(text: str, special: SpecialToken) -> str:
    """A text as a grammar has it: a special token can only be named."""
    token_id = special(text)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def named_arguments(use: ToolUse, key: str) -> tuple[str, ...]:
    """The rule `call` for `{"name": ..., key: {...}}`."""
    rules = [
        f'call_{index}: {json.dumps(_opening(tool.name, key))} {embedded(tool.parameters)} "}}"'
        for index, tool in enumerate(use.callable)
    ]
    return (one_of(len(rules)), *rules)


def one_of(num_calls: int) -> str:
    return "call: " + " | ".join(f"call_{index}" for index in range(num_calls))


def _opening(name: str, key: str) -> str:
    return f'{{"name": {json.dumps(name)}, "{key}": '


def read_object(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON value that begins there, and where it ends."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return value, end


def call_of(value: object, keys: Iterable[str] = ("arguments", "parameters")) -> ToolCall | None:
    """The call that an object of a name and arguments stands for; None for anything else."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments: object = next((value[key] for key in keys if key in value), {})
    if isinstance(arguments, str):
        read = read_object(arguments, 0)
        arguments = read[0] if read else None
    if not isinstance(arguments, Mapping):
        return None
    return written_call(value["name"], arguments)


def written_call(name: str, arguments: Mapping[str, Any]) -> ToolCall:
    return ToolCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
