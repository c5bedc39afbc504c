"""Checklist 123 to 130: what bodies ask of a model, answered by a real tiny one on real routes."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from jobs.batch import Endpoint
from server.app import create_app
from tests.contract.conftest import strict_client
from tests.support.box import MODEL, Box, chat_line, completion_line
from tests.support.server import serving
from tests.support.service import CHAT, COMPLETIONS, Service
from tests.support.tiny_models import write_tiny_model, write_tiny_tokenizer

RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
TEMPLATE = "{% for each in messages %}{{ each['content'] }}{% endfor %}{# <tool_call> #}{{ tools }}"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, contract_redis_url: str) -> Iterator[Service]:
    """An installation whose intake and worker have a tokenizer and a model of their own."""
    folder = tmp_path_factory.mktemp("bodies")
    box = Box(folder, f"{contract_redis_url}?db=2", lease_s=30, reconcile_s=5)
    write_tiny_model(folder / MODEL, "llama")
    write_tiny_tokenizer(folder / MODEL, chat_template=TEMPLATE, without="\u00b8\u00b9")
    with (
        serving(create_app(box.settings)) as url,
        box.running("intake", is_real=True),
        box.running("worker", is_real=True),
        strict_client(url) as client,
    ):
        box.until(lambda: box.redis.scard("rq:workers") == 2, seconds=120)
        yield Service(url=url, client=client, box=box)
    box.close()


def answers(service: Service, lines: list[str], endpoint: str) -> list[dict[str, Any]]:
    """Bodies of all lines in order, errors too."""
    batch = service.run(lines, endpoint=endpoint)
    assert batch.status == "completed", batch
    rows = service.rows(batch.output_file_id) + service.rows(batch.error_file_id)
    bodies = {row["custom_id"]: row["response"]["body"] for row in rows}
    return [bodies[f"c-{index}"] for index in range(len(lines))]


def chats(service: Service, *asked: dict[str, Any]) -> list[ChatCompletion]:
    lines = [chat_line(index, **body) for index, body in enumerate(asked)]
    found = answers(service, lines, CHAT)
    return [ChatCompletion.model_validate(body, strict=True) for body in found]


def test_123_choices_limits_and_stops(real: Service) -> None:
    drawn = {"n": 3, "max_tokens": 8, "seed": 1, "ignore_eos": True}
    (free,) = chats(real, drawn)
    assert [choice.index for choice in free.choices] == [0, 1, 2]
    assert [choice.finish_reason for choice in free.choices] == ["length"] * 3
    texts = [choice.message.content or "" for choice in free.choices]
    assert len(set(texts)) == 3
    assert free.usage is not None
    assert free.usage.completion_tokens == 24
    stop = next(letter for letter in texts[0][1:] if letter.isascii())
    (stopped,) = chats(real, {**drawn, "messages": messages(0), "stop": stop})
    first = stopped.choices[0]
    assert first.finish_reason == "stop"
    assert first.message.content == texts[0][: texts[0].index(stop)]


def messages(index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"hi {index}"}]


def test_124_logprobs_have_alternatives_and_bytes(real: Service) -> None:
    asked = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    (answer,) = chats(real, {**asked, "logprobs": True, "top_logprobs": 5})
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    scores = logprobs.content or []
    assert len(scores) == 4
    for score in scores:
        assert len(score.top_logprobs) == 5
        assert score.bytes is not None
        assert all(each.bytes is not None for each in score.top_logprobs)
        tops = [each.logprob for each in score.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert score.logprob == tops[0]


def test_125_schemas_hold_and_what_is_no_format_is_refused(real: Service) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    lines = [
        chat_line(0, response_format=form, max_tokens=60),
        chat_line(1, response_format={"type": "grammar"}),
        chat_line(2, response_format=form | {"json_schema": {"name": "x", "schema": {"not": {}}}}),
    ]
    held, no_format, no_schema = answers(real, lines, CHAT)
    answer = ChatCompletion.model_validate(held, strict=True)
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"ok", "size"}
    assert (type(found["ok"]), found["size"] in (1, 2)) == (bool, True)
    for refused in (no_format, no_schema):
        assert refused["error"]["type"] == "invalid_request_error"
        assert refused["error"]["param"].startswith("response_format")


def test_126_a_forced_function_is_called(real: Service) -> None:
    function = {"name": "book", "parameters": SCHEMA}
    (answer,) = chats(
        real,
        {
            "tools": [{"type": "function", "function": function}],
            "tool_choice": {"type": "function", "function": {"name": "book"}},
            "max_tokens": 120,
        },
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "book"
    assert set(json.loads(call.function.arguments)) == {"ok", "size"}


def test_127_prompts_by_choices_a_default_of_sixteen_and_texts_that_are_scored(
    real: Service,
) -> None:
    lines = [
        completion_line(0, prompt=["ab", "cd"], n=2, max_tokens=2, echo=True, ignore_eos=True),
        chat_without_limit(1),
    ]
    several, default = (
        Completion.model_validate(body, strict=True) for body in answers(real, lines, COMPLETIONS)
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text[:2] for choice in several.choices] == ["ab", "ab", "cd", "cd"]
    assert default.usage is not None
    assert default.usage.completion_tokens == 16
    scoring = {"echo": True, "logprobs": 2, "max_tokens": 0}
    token_ids = [5, 9, 77, 60]
    lines = [
        completion_line(0, prompt="hello", **scoring),
        completion_line(1, prompt=[token_ids, [8, 9]], n=2, **scoring),
        completion_line(2, prompt=token_ids, **scoring | {"max_tokens": 1, "ignore_eos": True}),
    ]
    # As the client makes them: its types have no null for the first token.
    text, tokens, more = (
        Completion.construct(**body) for body in answers(real, lines, COMPLETIONS)
    )
    assert (text.choices[0].text, text.choices[0].finish_reason) == ("hello", "length")
    told = text.choices[0].logprobs
    assert told is not None
    assert told.tokens == list("hello")
    assert told.text_offset == [0, 1, 2, 3, 4]
    assert [choice.index for choice in tokens.choices] == [0, 1, 2, 3]
    assert tokens.choices[0].logprobs == tokens.choices[1].logprobs
    assert tokens.usage is not None
    assert (tokens.usage.completion_tokens, tokens.usage.prompt_tokens) == (0, 6)
    require_scores(real, token_ids, tokens.choices[0].logprobs)
    require_scores(real, token_ids, more.choices[0].logprobs)
    assert more.choices[0].logprobs is not None
    assert len(more.choices[0].logprobs.tokens or []) == 5


def require_scores(service: Service, token_ids: list[int], told: Any) -> None:
    """As evaluation harnesses read them: nothing of the first token, then the library's own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        service.box.settings.model, dtype=torch.float32
    )
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0]
    expected = logits.double().log_softmax(dim=-1)
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    for at, token_id in enumerate(token_ids[1:], start=1):
        value = float(expected[at - 1, token_id])
        assert told.token_logprobs[at] == pytest.approx(value, abs=1e-4)
        assert max(told.top_logprobs[at].values()) == pytest.approx(
            float(expected[at - 1].max()), abs=1e-4
        )
        assert told.top_logprobs[at][told.tokens[at]] == told.token_logprobs[at]


def test_128_embeddings_as_numbers_and_as_bytes(real: Service) -> None:
    texts = ["a ship", "a train", "a ship"]
    asked: list[dict[str, Any]] = [
        {"input": texts},
        {"input": texts, "encoding_format": "base64"},
        {"input": "a train", "dimensions": 7, "pooling": "mean", "user": "me"},
        {"input": [[5, 6, 7], [8]]},
        {"input": "a train", "dimensions": 65},
    ]
    lines = [embedding_line(index, **body) for index, body in enumerate(asked)]
    numbers, raw, short, tokens, refused = answers(real, lines, EMBEDDINGS)
    parsed = [
        CreateEmbeddingResponse.model_validate(body, strict=True)
        for body in (numbers, short, tokens)
    ]
    assert [each.index for each in parsed[0].data] == [0, 1, 2]
    first, second, third = (np.array(each.embedding, dtype="<f4") for each in parsed[0].data)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-6)
    assert first.tobytes() == third.tobytes() != second.tobytes()
    assert [base64.b64decode(each["embedding"]) for each in raw["data"]] == [
        each.tobytes() for each in (first, second, third)
    ]
    assert (parsed[0].usage.prompt_tokens, parsed[0].usage.total_tokens) == (6 + 7 + 6, 19)
    assert [len(each.embedding) for each in (*parsed[1].data, *parsed[2].data)] == [7, 64, 64]
    assert parsed[2].usage.prompt_tokens == 4
    assert refused["error"]["param"] == "dimensions"


def embedding_line(index: int, **body: Any) -> str:
    fields = {"model": MODEL, **body}
    return json.dumps(
        {"custom_id": f"c-{index}", "method": "POST", "url": EMBEDDINGS, "body": fields}
    )


def chat_without_limit(index: int) -> str:
    line = json.loads(completion_line(index, ignore_eos=True))
    del line["body"]["max_tokens"]
    return json.dumps(line)


def test_129_a_response_cut_short_is_incomplete(real: Service) -> None:
    body = {"model": MODEL, "input": "hi", "max_output_tokens": 16, "ignore_eos": True}
    line = {"custom_id": "c-0", "method": "POST", "url": RESPONSES, "body": body}
    (found,) = answers(real, [json.dumps(line)], Endpoint.RESPONSES)
    answer = Response.model_validate(found, strict=True)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert {"input_tokens", "output_tokens", "total_tokens"} <= set(found["usage"])
    assert found["usage"]["output_tokens"] == 16


def test_130_a_seed_repeats_a_text(real: Service) -> None:
    asked = {"messages": messages(0), "max_tokens": 12, "temperature": 1, "ignore_eos": True}
    seeds = [{**asked, "seed": 5}, {**asked, "seed": 5}, {**asked, "seed": 6}]
    first, again, other = (each.choices[0].message.content for each in chats(real, *seeds))
    assert first == again != other
    (later,) = chats(real, seeds[0])
    assert later.choices[0].message.content == first
