"""Llama 3: the whole answer is JSON of a name and parameters, after a tag or without one."""

from typing import Final

from jobs.tools import ToolUse
from worker.tool_calls.base import Form, Said, SpecialToken, call_of, named_arguments, read_object

_TAG: Final = "<|python_tag|>"
_ENDS: Final = ("<|eom_id|>", "<|eot_id|>")


class Llama:
    id_characters: int | None = None

    def fits(self, template: str) -> bool:
        return _TAG in template or (
            "<|start_header_id|>" in template and '"parameters"' in template
        )

    def form(self, use: ToolUse, template: str, special: SpecialToken) -> Form:
        return Form(head="", body="call", rules=named_arguments(use, "parameters"), separator="; ")

    def read(self, text: str) -> Said:
        at = len(text) - len(text.lstrip())
        at += len(_TAG) if text.startswith(_TAG, at) else 0
        calls = []
        while (read := read_object(text, at)) is not None:
            call = call_of(read[0])
            if call is None:
                return Said(text=text, calls=())
            calls.append(call)
            at = read[1] + len(text[read[1] :]) - len(text[read[1] :].lstrip("; \n"))
        if text[at:].strip() not in ("", *_ENDS):
            return Said(text=text, calls=())
        return Said(text="" if calls else text, calls=tuple(calls))
