"""Answers in the shapes that the official client takes, strictly."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types import Completion as TextAnswer
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from engine.config import Completion, FinishReason, Scoring, TokenLogprobs
from jobs.batch import Batch, Endpoint
from tests.support.fake_engine import FakeTokenizer
from worker.answering import Answerer, Gathering
from worker.render import Renderer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def batch_of(endpoint: Endpoint) -> Batch:
    return Batch(
        id="batch_1",
        endpoint=endpoint,
        input_file_id="file-1",
        completion_window="24h",
        created_at=0,
        expires_at=1,
        model="m",
    )


def completion_of(key: str, text: str, *, index: int = 0, **changes: Any) -> Completion:
    plain = Completion(
        key=key,
        index=index,
        token_ids=tuple(text.encode()),
        text=text,
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=3,
        num_generated=len(text) + 1,
    )
    return dataclasses.replace(plain, **changes)


def answer(
    endpoint: Endpoint,
    body: dict[str, Any],
    texts: Sequence[str],
    *,
    tokenizer: FakeTokenizer | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The answer to a line whose completions are these, the last one first."""
    tokenizer = tokenizer or FakeTokenizer()
    batch = batch_of(endpoint)
    renderer = Renderer(tokenizer=tokenizer, max_context_tokens=100)
    rendered = renderer.render(batch, 7, {"model": "m", **body})
    places = [(prompt.key, at) for prompt in rendered.prompts for at in range(rendered.ask.n)]
    gathering = Gathering(rendered)
    found = list(zip(places, texts, strict=True))
    ends = [
        gathering.add(completion_of(key, text, index=index, **changes))
        for (key, index), text in reversed(found)
    ]
    assert ends == [False] * (len(found) - 1) + [True]
    return Answerer(tokenizer, fingerprint="f").body(batch, 7, gathering)


def scores(text: str) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(token_id=raw, logprob=-0.5, top=((raw, -0.5), (97, -2.0)))
        for raw in text.encode()
    )


def test_a_chat_answer_is_what_the_client_expects() -> None:
    body = answer(Endpoint.CHAT_COMPLETIONS, CHAT | {"n": 2}, ["a", "b"], num_cached_tokens=2)
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert [choice.message.content for choice in parsed.choices] == ["a", "b"]
    assert [choice.index for choice in parsed.choices] == [0, 1]
    assert parsed.system_fingerprint == "fp_f"
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (3, 4)
    assert parsed.usage.prompt_tokens_details is not None
    assert parsed.usage.prompt_tokens_details.cached_tokens == 2
    assert body == answer(
        Endpoint.CHAT_COMPLETIONS, CHAT | {"n": 2}, ["a", "b"], num_cached_tokens=2
    ) | {"created": body["created"]}


@pytest.mark.parametrize(
    ("reason", "status"),
    [(FinishReason.STOP, "completed"), (FinishReason.LENGTH, "incomplete")],
)
def test_a_response_is_what_the_client_expects(reason: FinishReason, status: str) -> None:
    asked = {"input": "hi", "instructions": "be brief", "metadata": {"a": "b"}, "temperature": 0.5}
    body = answer(Endpoint.RESPONSES, asked, ["well"], finish_reason=reason)
    parsed = Response.model_validate(body, strict=True)
    assert (parsed.output_text, parsed.status) == ("well", status)
    assert (parsed.instructions, parsed.metadata) == ("be brief", {"a": "b"})
    assert parsed.temperature == 0.5
    assert parsed.usage is not None
    assert (parsed.usage.input_tokens, parsed.usage.output_tokens) == (3, 5)


def test_a_chats_logprobs_have_bytes_and_alternatives() -> None:
    asked = CHAT | {"logprobs": True, "top_logprobs": 2}
    body = answer(Endpoint.CHAT_COMPLETIONS, asked, ["\u00e9"], logprobs=scores("\u00e9"))
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert parsed.choices[0].logprobs is not None
    assert parsed.choices[0].logprobs.content is not None
    first, second = parsed.choices[0].logprobs.content
    assert (first.bytes, second.bytes) == ([0xC3], [0xA9])
    assert [each.token for each in first.top_logprobs] == ["\ufffd", "a"]


def test_a_texts_logprobs_have_the_legacy_shape() -> None:
    body = answer(
        Endpoint.COMPLETIONS,
        {"prompt": "x", "logprobs": 2},
        ["h\u00e9!"],
        logprobs=scores("h\u00e9!"),
    )
    parsed = TextAnswer.model_validate(body, strict=True)
    told = parsed.choices[0].logprobs
    assert told is not None
    assert told.text_offset == [0, 1, 1, 2]
    assert told.token_logprobs == [-0.5] * 4
    assert told.top_logprobs is not None
    assert told.top_logprobs[0] == {"h": -0.5, "a": -2.0}


def test_tokens_of_the_stop_have_no_logprobs() -> None:
    asked = {"prompt": "x", "logprobs": 0, "stop": "cd"}
    body = answer(Endpoint.COMPLETIONS, asked, ["ab"], logprobs=scores("abcd"))
    assert body["choices"][0]["logprobs"]["tokens"] == ["a", "b"]


def test_each_prompt_has_its_choices_in_order_and_is_counted_once() -> None:
    body = answer(Endpoint.COMPLETIONS, {"prompt": ["x", "y"], "n": 2}, ["a", "b", "c", "d"])
    parsed = TextAnswer.model_validate(body, strict=True)
    assert [choice.text for choice in parsed.choices] == ["a", "b", "c", "d"]
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (6, 8)


@pytest.mark.parametrize(
    ("reason", "faulty"), [(FinishReason.FAULT, True), (FinishReason.LENGTH, False)]
)
def test_a_faulty_completion_makes_its_line_faulty(reason: FinishReason, *, faulty: bool) -> None:
    renderer = Renderer(tokenizer=FakeTokenizer(), max_context_tokens=100)
    rendered = renderer.render(
        batch_of(Endpoint.CHAT_COMPLETIONS), 0, {"model": "m", **CHAT, "n": 2}
    )
    gathering = Gathering(rendered)
    key = rendered.prompts[0].key
    assert not gathering.add(completion_of(key, "a"))
    assert not gathering.add(completion_of(key, "a"))  # the same once more
    assert gathering.add(completion_of(key, "b", index=1, finish_reason=reason))
    assert gathering.is_faulty is faulty


def test_an_echo_is_the_prompt_before_its_completion() -> None:
    asked = {"prompt": ["x", [121, 122]], "echo": True, "max_tokens": 1}
    body = answer(Endpoint.COMPLETIONS, asked, ["a", "b"], finish_reason=FinishReason.LENGTH)
    assert [choice["text"] for choice in body["choices"]] == ["xa", "yzb"]


def test_an_echo_with_logprobs_tells_of_the_prompt_and_of_what_ended_it() -> None:
    asked = {"prompt": "h\u00e9", "echo": True, "logprobs": 1, "max_tokens": 2, "stop": "b"}
    told, end = scores("h\u00e9"), TokenLogprobs(token_id=33, logprob=-1.5)
    body = answer(
        Endpoint.COMPLETIONS, asked, ["a"], logprobs=scores("ab"), prompt_logprobs=told[1:]
    )
    # The client's types have no null here, and what it makes of an answer has one all the same.
    choice = TextAnswer.construct(**body).choices[0]
    assert choice.text == "h\u00e9a"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert choice.logprobs.text_offset == [0, 1, 1, 2]
    assert body["choices"][0]["logprobs"]["top_logprobs"][0] is None
    ended = answer(
        Endpoint.COMPLETIONS,
        {"prompt": "h\u00e9", "echo": True, "logprobs": 1, "max_tokens": 1},
        [""],
        logprobs=(),
        end_logprobs=end,
        prompt_logprobs=told[1:],
    )
    # A harness that asks for one token more leaves the last one out, whatever it is.
    assert ended["choices"][0]["logprobs"]["token_logprobs"][1:-1] == [-0.5, -0.5]


class Beginning(FakeTokenizer):
    """Puts a special token before each text."""

    def encode(self, text: str) -> list[int]:
        return [60, *super().encode(text)]

    def special_token_id(self, text: str) -> int | None:
        return 60 if text == "<" else None


@pytest.mark.parametrize(("prompt", "offsets"), [("ab", [0, 0, 1]), ([60, 97], [0, 0])])
def test_a_special_token_takes_no_place_in_an_echo(prompt: object, offsets: list[int]) -> None:
    asked = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
    told = scores("ab")[: len(offsets) - 1]
    body = answer(
        Endpoint.COMPLETIONS,
        asked,
        [""],
        tokenizer=Beginning(),
        logprobs=(),
        prompt_logprobs=told,
    )
    assert body["choices"][0]["logprobs"]["text_offset"] == offsets


def test_nothing_generated_is_as_many_choices_as_were_asked_for() -> None:
    renderer = Renderer(tokenizer=FakeTokenizer(), max_context_tokens=2)
    batch = batch_of(Endpoint.COMPLETIONS)
    asked = {"model": "m", "prompt": "xy", "n": 2, "max_tokens": 0, "echo": True, "logprobs": 1}
    rendered = renderer.render(batch, 0, asked)
    (prompt,) = rendered.prompts
    assert (prompt.sampling.n, prompt.reading) == (1, Scoring(num_top=1))
    gathering = Gathering(rendered)
    assert gathering.add(
        completion_of(prompt.key, "", logprobs=(), prompt_logprobs=scores("y"), num_generated=0)
    )
    body = Answerer(FakeTokenizer(), fingerprint="f").body(batch, 0, gathering)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][1]["logprobs"]["token_logprobs"] == [None, -0.5]


def test_the_likeliest_of_several_are_answered_and_all_are_counted() -> None:
    renderer = Renderer(tokenizer=FakeTokenizer(), max_context_tokens=100)
    batch = batch_of(Endpoint.COMPLETIONS)
    rendered = renderer.render(batch, 0, {"model": "m", "prompt": ["x", "y"], "n": 2, "best_of": 3})
    assert {prompt.sampling.n for prompt in rendered.prompts} == {3}
    gathering = Gathering(rendered)
    means = {
        ("x", 0): -1.0,
        ("x", 1): -0.25,
        ("x", 2): -0.5,
        ("y", 0): -3,
        ("y", 1): -2,
        ("y", 2): -4,
    }
    for (name, index), mean in means.items():
        key = rendered.prompts["xy".index(name)].key
        told = (TokenLogprobs(token_id=97, logprob=mean),) * (index + 1)
        gathering.add(completion_of(key, f"{name}{index}", index=index, logprobs=told))
    body = Answerer(FakeTokenizer(), fingerprint="f").body(batch, 0, gathering)
    assert [choice["text"] for choice in body["choices"]] == ["x1", "x2", "y1", "y0"]
    assert {choice["logprobs"] for choice in body["choices"]} == {None}
    assert body["usage"]["completion_tokens"] == 6 * 3
