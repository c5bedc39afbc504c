"""Whole answers as streams, in the shapes that the official client takes, strictly."""

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from jobs.answers import Answer, Choice, TokenScore, ToolCall, Usage, answer_body
from jobs.batch import Endpoint
from jobs.responses import response_body
from jobs.streams import stream_text

USAGE = Usage(input_tokens=3, output_tokens=2)


def answer_of(*choices: Choice) -> Answer:
    return Answer(
        batch_id="rider_1",
        line_index=0,
        model="m",
        fingerprint="f",
        created_at=7,
        choices=choices,
        usage=USAGE,
    )


def told(body: dict[str, Any], endpoint: Endpoint, *, with_usage: bool = False) -> list[Any]:
    """The events' data; what follows `event: ` is the type that the data has."""
    *events, rest = stream_text(body, endpoint, with_usage=with_usage).split("\n\n")
    assert rest == ""
    found: list[Any] = []
    for event in events:
        name, _, data = event.partition("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
        assert not name or name == f"event: {found[-1]['type']}\n"
    return found


def test_calls_of_functions_are_told_with_their_places() -> None:
    calls = tuple(ToolCall(name=name, arguments="{}") for name in ("a", "b"))
    choice = Choice(text="", finish_reason="tool_calls", tool_calls=calls)
    body = answer_body(answer_of(choice), Endpoint.CHAT_COMPLETIONS)
    first, end = told(body, Endpoint.CHAT_COMPLETIONS)
    chunk = ChatCompletionChunk.model_validate(first, strict=True)
    assert end == "[DONE]"
    found = chunk.choices[0].delta.tool_calls or []
    assert [call.index for call in found] == [0, 1]
    asked = body["choices"][0]["message"]["tool_calls"]
    assert [call.id for call in found] == [call["id"] for call in asked]
    assert chunk.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("with_usage", [False, True])
def test_usage_is_told_when_asked(with_usage: bool) -> None:  # noqa: FBT001
    scores = (TokenScore(raw=b"x", logprob=-1.0),)
    body = answer_body(
        answer_of(Choice(text="x", finish_reason="stop", scores=scores)), Endpoint.COMPLETIONS
    )
    *events, end = told(body, Endpoint.COMPLETIONS, with_usage=with_usage)
    assert end == "[DONE]"
    parsed = [Completion.model_validate(event, strict=True) for event in events]
    assert [len(each.choices) for each in parsed] == ([1, 0] if with_usage else [1])
    assert parsed[0].usage is None
    assert parsed[0].choices[0].logprobs is not None
    if parsed[-1].usage:
        assert parsed[-1].usage.total_tokens == 5


@pytest.mark.parametrize(("reason", "last"), [("stop", "completed"), ("length", "incomplete")])
def test_a_response_is_told_from_its_creation_to_its_end(reason: str, last: str) -> None:
    body = response_body(answer_of(Choice(text="höch\u2028st", finish_reason=reason)))
    events = told(body, Endpoint.RESPONSES)
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    parsed = [adapter.validate_python(event, strict=True) for event in events]
    assert [each.sequence_number for each in parsed] == list(range(len(parsed)))
    assert parsed[0].type == "response.created"
    assert parsed[0].response.status == "in_progress"
    assert parsed[-1].type == f"response.{last}"
    assert events[-1]["response"] == body
    (delta,) = [each.delta for each in parsed if each.type == "response.output_text.delta"]
    assert delta == "höch\u2028st"
