"""`/v1/responses`: text in and text out, as a chat with the endpoint's own names and shapes.

Nothing is stored, so what would go on from a stored response is refused by name.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from jobs.answers import Answer, Choice
from jobs.formats import parse_flat_format
from jobs.messages import parse_messages
from jobs.values import integer, unsupported, wrong_type

MIN_OUTPUT_TOKENS: Final = 16
_PART_TYPES: Final[Mapping[str, str]] = {"input_text": "text", "output_text": "text"}
_IGNORED: Final = ("id", "status", "type")
"""What an item of an earlier response brings along."""


def parse_response_ask(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is the endpoint's own of a request, as fields of an Ask. Raises InvalidRequestError."""
    text = given.get("text", {})
    if not isinstance(text, dict):
        raise wrong_type("text", "an object", text)
    for name, value in text.items():
        if name != "format" and (name, value) not in {("verbosity", "medium"), ("verbosity", None)}:
            raise unsupported(f"text.{name}", "is not supported with this value by this server")
    max_tokens = integer(given, "max_output_tokens", low=MIN_OUTPUT_TOKENS)
    return {
        "messages": _messages(given),
        "param": "input",
        "max_tokens": max_tokens,
        "schema": parse_flat_format(text.get("format")),
        "schema_param": "text.format",
        "echoed": {
            "instructions": given.get("instructions"),
            "max_output_tokens": max_tokens,
            "metadata": _metadata(given.get("metadata", {})),
            "temperature": given.get("temperature", 1.0),
            "text": {"format": text.get("format") or {"type": "text"}, "verbosity": "medium"},
            "top_p": given.get("top_p", 1.0),
        },
    }


def _metadata(given: object) -> Mapping[str, str]:
    if not isinstance(given, dict):
        raise wrong_type("metadata", "an object", given)
    for name, value in given.items():
        if not isinstance(value, str):
            raise wrong_type(f"metadata.{name}", "a string", value)
    return given


def _messages(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    items = given.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise wrong_type("input", "a string or an array of items", items)
    said = parse_messages([_item(item, f"input[{at}]") for at, item in enumerate(items)], "input")
    instructions = given.get("instructions")
    if instructions is None:
        return said
    if not isinstance(instructions, str):
        raise wrong_type("instructions", "a string", instructions)
    (told,) = parse_messages([{"role": "system", "content": instructions}], "instructions")
    return (told, *said)


def _item(item: object, place: str) -> object:
    if not isinstance(item, dict):
        raise wrong_type(place, "an object", item)
    if item.get("type", "message") != "message":
        raise unsupported(f"{place}.type", "is not 'message', the only type this server takes")
    found = {name: value for name, value in item.items() if name not in _IGNORED}
    if isinstance(found.get("content"), list):
        found["content"] = [_part(part) for part in found["content"]]
    return found


def _part(part: object) -> object:
    """As a chat has it. Types of its own stay and are refused by its parser."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return part
    kind = _PART_TYPES.get(part["type"], f"{part['type']} of a response")
    return {"type": kind, "text": part.get("text")}


def response_body(answer: Answer) -> dict[str, Any]:
    (choice,) = answer.choices
    is_cut = choice.finish_reason == "length"
    status = "incomplete" if is_cut else "completed"
    usage = answer.usage
    return {
        "id": f"resp_{_digest(answer, 'response')}",
        "object": "response",
        "created_at": answer.created_at,
        "completed_at": None if is_cut else answer.created_at,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "model": answer.model,
        "output": [_message(answer, choice, status)],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": 0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": 0,  # the client takes it for required
            },
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.input_tokens + usage.output_tokens,
        },
        "system_fingerprint": f"fp_{answer.fingerprint}",
        **answer.echoed,
    }


def _message(answer: Answer, choice: Choice, status: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": choice.text, "annotations": [], "logprobs": []}
    return {
        "id": f"msg_{_digest(answer, 'message')}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [part],
    }


def _digest(answer: Answer, kind: str) -> str:
    facts = json.dumps([kind, answer.batch_id, answer.line_index])
    return hashlib.sha256(facts.encode()).hexdigest()[:32]
