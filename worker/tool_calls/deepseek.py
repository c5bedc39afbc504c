"""DeepSeek V3 and R1: calls between marks that are tokens; arguments as a block of JSON, or bare."""

import json
import re
from collections.abc import Mapping
from typing import Final

from engine.grammar import embedded
from jobs.tools import ToolUse
from worker.tool_calls.base import (
    Form,
    Said,
    SpecialToken,
    atom,
    one_of,
    read_object,
    written_call,
)

_OPEN: Final = "<｜tool▁calls▁begin｜>"  # noqa: RUF001 - the model's own marks
_CLOSE: Final = "<｜tool▁calls▁end｜>"  # noqa: RUF001
_OPEN_CALL: Final = "<｜tool▁call▁begin｜>"  # noqa: RUF001
_CLOSE_CALL: Final = "<｜tool▁call▁end｜>"  # noqa: RUF001
_BETWEEN: Final = "<｜tool▁sep｜>"  # noqa: RUF001
_CALL: Final = re.compile(
    rf"{_OPEN_CALL}(?:function{_BETWEEN})?([\w-]+)(?:{_BETWEEN})?\s*(?:```json)?\s*"
)


class DeepSeek:
    id_characters: int | None = None

    def fits(self, template: str) -> bool:
        return _OPEN in template

    def form(self, use: ToolUse, template: str, special: SpecialToken) -> Form:
        begin, end, between = (atom(x, special) for x in (_OPEN_CALL, _CLOSE_CALL, _BETWEEN))
        calls = []
        for index, tool in enumerate(use.callable):
            name, schema = json.dumps(tool.name), embedded(tool.parameters)
            if "```json" in template:
                opening = json.dumps(f"{tool.name}\n```json\n")
                inner = f'"function" {between} {opening} {schema} "\\n```"'
            else:
                inner = f"{name} {between} {schema}"
            calls.append(f"call_{index}: {begin} {inner} {end}")
        more = r" (NEWLINE? call)*" if use.is_parallel else ""
        return Form(
            head=_OPEN,
            body=f"call{more} {atom(_CLOSE, special)}",
            rules=(one_of(len(calls)), *calls, *([r'NEWLINE: "\n"'] if more else [])),
            repeats=False,
        )

    def read(self, text: str) -> Said:
        before, mark, rest = text.partition(_OPEN)
        calls = []
        for match in _CALL.finditer(rest if mark else ""):
            read = read_object(rest, match.end())
            if read is not None and isinstance(read[0], Mapping):
                calls.append(written_call(match[1], read[0]))
        return Said(text=before.strip() if calls else text, calls=tuple(calls))
