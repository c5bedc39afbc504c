"""A whole answer told as a stream: its events for clients that asked for one, all of them at the end.

`STREAMS` has a line for each endpoint that can; knows no HTTP but the form of an event.
"""

import json
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from jobs.batch import Endpoint

Body = Mapping[str, Any]
_DONE: Final = "data: [DONE]\n\n"


def stream_text(body: Body, endpoint: Endpoint, *, with_usage: bool) -> str:
    """The events, as they go over the wire. `with_usage`: the last one tells it, for endpoints that
    tell it only when asked.
    """
    return "".join(STREAMS[endpoint](body, with_usage))


def _chat(body: Body, with_usage: bool) -> Iterator[str]:  # noqa: FBT001 - one of a table
    choices = [
        {
            "index": choice["index"],
            "delta": _delta(choice["message"]),
            "logprobs": choice["logprobs"],
            "finish_reason": choice["finish_reason"],
        }
        for choice in body["choices"]
    ]
    yield from _chunks({**body, "object": "chat.completion.chunk", "choices": choices}, with_usage)


def _delta(message: Body) -> dict[str, Any]:
    found = {name: message[name] for name in ("role", "content", "refusal")}
    if calls := message.get("tool_calls"):
        found["tool_calls"] = [{"index": at, **call} for at, call in enumerate(calls)]
    return found


def _text(body: Body, with_usage: bool) -> Iterator[str]:  # noqa: FBT001 - one of a table
    yield from _chunks(dict(body), with_usage)


def _chunks(chunk: dict[str, Any], with_usage: bool) -> Iterator[str]:  # noqa: FBT001
    usage = chunk.pop("usage")
    if not with_usage:
        yield _event(chunk)
    else:
        yield _event(chunk | {"usage": None})
        yield _event(chunk | {"choices": [], "usage": usage})
    yield _DONE


def _response(body: Body, _with_usage: bool) -> Iterator[str]:  # noqa: FBT001 - one of a table
    for number, (kind, facts) in enumerate(_response_events(body)):
        yield _event({"type": kind, "sequence_number": number, **facts}, name=kind)


def _response_events(body: Body) -> Iterator[tuple[str, dict[str, Any]]]:
    (message,) = body["output"]
    (part,) = message["content"]
    response = {
        **body,
        "status": "in_progress",
        "output": [],
        "usage": None,
        "completed_at": None,
        "incomplete_details": None,
    }
    item = {"output_index": 0}
    place = {**item, "item_id": message["id"], "content_index": 0}
    yield "response.created", {"response": response}
    yield "response.in_progress", {"response": response}
    opened = {**message, "status": "in_progress", "content": []}
    yield "response.output_item.added", {**item, "item": opened}
    yield "response.content_part.added", {**place, "part": {**part, "text": ""}}
    yield "response.output_text.delta", {**place, "delta": part["text"], "logprobs": []}
    yield "response.output_text.done", {**place, "text": part["text"], "logprobs": []}
    yield "response.content_part.done", {**place, "part": part}
    yield "response.output_item.done", {**item, "item": message}
    yield f"response.{body['status']}", {"response": body}


def _event(data: Body, *, name: str | None = None) -> str:
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data)}\n\n"


STREAMS: Final[Mapping[Endpoint, Callable[[Body, bool], Iterator[str]]]] = types.MappingProxyType(
    {
        Endpoint.CHAT_COMPLETIONS: _chat,
        Endpoint.COMPLETIONS: _text,
        Endpoint.RESPONSES: _response,
    }
)
