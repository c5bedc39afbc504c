"""Hermes, and Qwen 2.5 and 3 after it: JSON between `<tool_call>` and `</tool_call>`."""

import re
from typing import Final

from jobs.tools import ToolUse
from worker.tool_calls.base import Form, Said, SpecialToken, call_of, named_arguments, read_object

_OPEN: Final = "<tool_call>"
_CALL: Final = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_OTHERS: Final = ("<function=", "<arg_key>")
"""What templates have that put something else between the same marks."""


class Hermes:
    id_characters: int | None = None

    def fits(self, template: str) -> bool:
        return _OPEN in template and not any(other in template for other in _OTHERS)

    def form(self, use: ToolUse, template: str, special: SpecialToken) -> Form:
        return Form(
            head=_OPEN,
            body=r'"\n" call "\n</tool_call>"',
            rules=named_arguments(use, "arguments"),
            separator="\n",
        )

    def read(self, text: str) -> Said:
        calls, rest, end = [], [], 0
        for match in _CALL.finditer(text):
            read = read_object(match[1], 0)
            call = call_of(read[0]) if read else None
            if call is not None:
                calls.append(call)
                rest.append(text[end : match.start()])
                end = match.end()
        rest.append(text[end:])
        return Said(text="".join(rest).strip() if calls else text, calls=tuple(calls))
