"""Mistral: `[TOOL_CALLS]` and a list of JSON objects; newer ones a name, `[ARGS]` and arguments."""

import json
import re
from collections.abc import Mapping
from typing import Final

from engine.grammar import embedded
from jobs.answers import ToolCall
from jobs.tools import ToolUse
from worker.tool_calls.base import (
    Form,
    Said,
    SpecialToken,
    atom,
    call_of,
    named_arguments,
    one_of,
    read_object,
    written_call,
)

_OPEN: Final = "[TOOL_CALLS]"
_ARGUMENTS: Final = "[ARGS]"
_NAMED: Final = re.compile(r"\s*([\w-]+)\s*(?:\[CALL_ID\][^\[]*)?\[ARGS\]")


class Mistral:
    id_characters: int | None = 9

    def fits(self, template: str) -> bool:
        return _OPEN in template

    def form(self, use: ToolUse, template: str, special: SpecialToken) -> Form:
        if _ARGUMENTS in template:
            mark = atom(_ARGUMENTS, special)
            calls = [
                f"call_{index}: {json.dumps(tool.name)} {mark} {embedded(tool.parameters)}"
                for index, tool in enumerate(use.callable)
            ]
            return Form(head=_OPEN, body="call", rules=(one_of(len(calls)), *calls))
        more = ' (", " call)*' if use.is_parallel else ""
        return Form(
            head=_OPEN,
            body=f'"[" call{more} "]"',
            rules=named_arguments(use, "arguments"),
            repeats=False,
        )

    def read(self, text: str) -> Said:
        before, *parts = text.split(_OPEN)
        calls = [call for part in parts for call in _calls(part)]
        return Said(text=before.strip() if calls else text, calls=tuple(calls))


def _calls(part: str) -> list[ToolCall]:
    named = _NAMED.match(part)
    if named is not None:
        read = read_object(part, named.end() + _num_blanks(part, named.end()))
        is_whole = read is not None and isinstance(read[0], Mapping)
        return [written_call(named[1], read[0])] if read is not None and is_whole else []
    read = read_object(part, _num_blanks(part, 0))
    values = read[0] if read and isinstance(read[0], list) else []
    found = [call_of(value) for value in values]
    return [call for call in found if call is not None]


def _num_blanks(text: str, start: int) -> int:
    return len(text[start:]) - len(text[start:].lstrip())
