"""Requests outside batches: the same answers and refusals, from the same block, while a client waits."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from redis import Redis
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from jobs.batch import Endpoint
from jobs.errors import RequestError
from jobs.ledger.ledger import Ledger, Model
from jobs.parameters import PARAMETERS
from jobs.settings import Settings
from jobs.stores import STORES
from server.app import create_app
from server.rider_request import parse_rider_request
from tests.contract.conftest import strict_client
from tests.support.box import MODEL, chat_line, completion_line
from tests.support.processes import wait_until
from tests.support.server import Running, serving
from tests.support.service import CHAT, COMPLETIONS, Service
from tests.support.wire import error_of

RESPONSES = "/v1/responses"
HI: list[Any] = [{"role": "user", "content": "hi"}]
TINY: dict[str, Any] = {"model": MODEL, "messages": HI}
JSON = {"content-type": "application/json"}
TEXTS: dict[str, Any] = {"messages": HI, "prompt": "x", "input": "x"}
NOTHING = {"name": "x", "schema": {"not": {}}}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
CITY: Any = {
    "type": "function",
    "function": {"name": "book", "parameters": {"type": "object", "properties": {}}},
}


# -- answers ---------------------------------------------------------------------------------


def test_every_endpoint_of_batches_answers_by_itself(service: Service) -> None:
    chat = service.client.chat.completions.create(model=MODEL, messages=HI, max_tokens=3, n=2)
    assert [len(choice.message.content or "") for choice in chat.choices] == [3, 3]
    assert chat.usage is not None
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (3, 6)
    plain = service.client.completions.create(model=MODEL, prompt=["ab", "c"], max_tokens=2)
    assert [len(choice.text) for choice in plain.choices] == [2, 2]
    response = service.client.responses.create(model=MODEL, input="hi", max_output_tokens=16)
    assert len(response.output_text) == 16
    assert len({chat.id, plain.id, response.id}) == 3
    vectors = service.client.embeddings.create(
        model=MODEL, input=["a", "bc"], encoding_format="float"
    )
    assert [each.index for each in vectors.data] == [0, 1]
    assert vectors.usage.prompt_tokens == 3
    # What the client asks for by itself, base64, it would refuse to read if it were strict.
    with OpenAI(base_url=f"{service.url}/v1", api_key="any") as client:
        packed = client.embeddings.create(model=MODEL, input="a")
    assert packed.data[0].embedding == pytest.approx(vectors.data[0].embedding)


def test_a_prompt_is_scored_as_evaluation_harnesses_ask(service: Service) -> None:
    asked = {"model": MODEL, "prompt": [97, 98, 99], "max_tokens": 0, "logprobs": 1, "echo": True}
    (choice,) = posted(service, COMPLETIONS, asked).json()["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]


def test_a_rider_is_answered_as_a_line_is(service: Service) -> None:
    asked = {"max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    batch = service.run([chat_line(0, **asked)], endpoint=CHAT)
    (row,) = service.rows(batch.output_file_id)
    ridden = posted(service, CHAT, json.loads(chat_line(0, **asked))["body"])
    assert ridden.status_code == 200
    told = [dict(body) for body in (row["response"]["body"], ridden.json())]
    for body in told:
        assert body.pop("id").startswith("chatcmpl-")
        assert body.pop("created") > 0
    assert told[0] == told[1]


def posted(service: Service, endpoint: str, body: object) -> httpx2.Response:
    return httpx2.post(f"{service.url}{endpoint}", json=body, timeout=60)


def test_fifty_at_once_and_a_batch_share_one_block(service: Service) -> None:
    batch = service.submit([completion_line(index, max_tokens=200) for index in range(8)])

    async def asked() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any") as client:
            asking = (
                client.completions.create(model=MODEL, prompt=f"p{index}", max_tokens=200)
                for index in range(50)
            )
            return await asyncio.gather(*asking)

    answers = asyncio.run(asked())
    assert [len(answer.choices[0].text) for answer in answers] == [200] * 50
    assert len({answer.id for answer in answers}) == 50
    assert service.wait(batch.id).status == "completed"
    kinds = [
        [row["key"].partition("_")[0] for row in sweep["rows"]]
        for sweep in service.box.calls("sweep")
    ]
    assert any(kind.count("rider") == 50 and kind.count("batch") == 8 for kind in kinds)


# -- streams: all of it at the end -----------------------------------------------------------


def test_a_chat_is_streamed_as_one_chunk(service: Service) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 3, "n": 2}
    plain = service.client.chat.completions.create(**asked, logprobs=True)
    (chunk,) = service.client.chat.completions.create(**asked, logprobs=True, stream=True)
    assert chunk.object == "chat.completion.chunk"
    assert [each.delta.content for each in chunk.choices] == [
        each.message.content for each in plain.choices
    ]
    assert [each.finish_reason for each in chunk.choices] == ["length", "length"]
    assert chunk.choices[0].delta.role == "assistant"
    scores, asked_plainly = chunk.choices[0].logprobs, plain.choices[0].logprobs
    assert scores is not None
    assert asked_plainly is not None
    assert scores.model_dump() == asked_plainly.model_dump()
    assert chunk.usage is None
    told = list(
        service.client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [len(each.choices) for each in told] == [2, 0]
    assert told[0].usage is None
    assert told[1].usage == plain.usage


def test_the_clients_own_accumulation_takes_the_streams(service: Service) -> None:
    with service.client.chat.completions.stream(model=MODEL, messages=HI, max_tokens=3) as chat:
        kinds = {event.type for event in chat}
        assert len(chat.current_completion_snapshot.choices[0].message.content or "") == 3
    assert {"chunk", "content.done"} <= kinds
    asked: dict[str, Any] = {"model": MODEL, "input": "hi", "max_output_tokens": 16}
    with service.client.responses.stream(**asked) as events:
        told = list(events)
    (done,) = [event for event in told if event.type == "response.output_text.done"]
    assert len(done.text) == 16
    assert told[0].type == "response.created"
    assert told[-1].type == "response.incomplete"  # by its length


def test_a_stream_is_events_and_ends_as_one(service: Service) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2, "stream": True}
    answer = posted(service, COMPLETIONS, body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    event, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    assert json.loads(event.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    texts = service.client.completions.create(
        model=MODEL, prompt="x", max_tokens=2, stream=True, stream_options={"include_usage": True}
    )
    said, usage = list(texts)
    assert (len(said.choices[0].text), len(usage.choices)) == (2, 0)


def test_an_async_client_streams_too(service: Service) -> None:
    async def asked() -> list[Any]:
        async with AsyncOpenAI(
            base_url=f"{service.url}/v1", api_key="any", _strict_response_validation=True
        ) as client:
            chunks = await client.chat.completions.create(
                model=MODEL, messages=HI, max_tokens=3, stream=True
            )
            return [chunk async for chunk in chunks]

    (chunk,) = asyncio.run(asked())
    assert len(chunk.choices[0].delta.content) == 3


# -- refusals --------------------------------------------------------------------------------


WRONG: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"temperature": 3}),
    (CHAT, {"prio": 1}),
    (CHAT, {"modalities": ["audio"]}),
    (CHAT, {"max_tokens": 0}),
    (CHAT, {"max_tokens": 1_000}),
    (CHAT, {"messages": [{"role": "user", "content": "refuse me"}]}),
    (CHAT, {"messages": [{"role": "nobody", "content": "x"}]}),
    (CHAT, {"tools": [CITY]}),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": NOTHING}}),
    (COMPLETIONS, {"prompt": "x" * 300}),
    (COMPLETIONS, {"prompt": [1_000]}),
    (COMPLETIONS, {"suffix": "x"}),
    (COMPLETIONS, {"best_of": 1, "n": 2}),
]


def test_refusals_are_those_of_lines(service: Service) -> None:
    lines = {CHAT: chat_line, COMPLETIONS: completion_line}
    for endpoint, line_of in lines.items():
        wrong = [change for each, change in WRONG if each == endpoint]
        lines_of_batch = [line_of(index, **change) for index, change in enumerate(wrong)]
        rows = service.rows(service.run(lines_of_batch, endpoint=endpoint).error_file_id)
        errors = [row["response"]["body"]["error"] for row in rows]
        answers = [posted(service, endpoint, json.loads(line)["body"]) for line in lines_of_batch]
        assert [answer.status_code for answer in answers] == [400] * len(wrong)
        assert [error_of(answer) for answer in answers] == errors
        assert {answer.headers["x-should-retry"] for answer in answers} == {"false"}


def test_a_stream_that_is_refused_is_refused_with_a_status(service: Service) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        service.client.chat.completions.create(
            model=MODEL, messages=HI, max_tokens=1_000, stream=True
        )
    assert refusal.value.code == "context_length_exceeded"


ASKED: dict[str, Any] = {"model": "org/name", "messages": HI}
REFUSED: list[tuple[str, Any, tuple[int, str | None, str | None]]] = [
    (CHAT, {"messages": HI}, (400, None, None)),
    (CHAT, ASKED | {"model": 7}, (400, "invalid_type", "model")),
    (CHAT, ASKED | {"model": "gpt-9"}, (404, "model_not_found", "model")),
    (CHAT, {"model": "org/name"}, (400, "missing_required_parameter", "messages")),
    (COMPLETIONS, {"model": "org/name"}, (400, "missing_required_parameter", "prompt")),
    (RESPONSES, {"model": "org/name"}, (400, "missing_required_parameter", "input")),
    (CHAT, ASKED | {"stream": "yes"}, (400, "invalid_type", "stream")),
    (CHAT, ASKED | {"stream_options": {}}, (400, "invalid_value", "stream_options")),
    (
        CHAT,
        ASKED | {"stream": True, "stream_options": {"x": True}},
        (400, "unknown_parameter", "stream_options.x"),
    ),
    (CHAT, [1], (400, "invalid_type", "body")),
]


@pytest.mark.parametrize(("endpoint", "body", "told"), REFUSED)
def test_what_is_wrong_is_refused_though_nobody_works(
    http: httpx2.Client, endpoint: str, body: Any, told: tuple[int, str | None, str | None]
) -> None:
    answer = http.post(endpoint, json=body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == told


def test_an_unknown_model_is_told_in_openais_words(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert "The model 'gpt-9' does not exist" in str(refusal.value)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[" * 100_000, b'{"model": NaN}', b'{"a": 1, "a": 2}', b'{"a": 1e999}'],
)
def test_what_no_line_may_be_no_rider_may(http: httpx2.Client, body: bytes) -> None:
    answer = http.post(CHAT, content=body, headers=JSON)
    assert answer.status_code == 400
    assert "parse" in str(error_of(answer)["message"])


def bodies_of(endpoint: Endpoint) -> st.SearchStrategy[tuple[Endpoint, dict[str, Any]]]:
    """A right one, with some of what it may have besides."""
    names = [each.name for each in PARAMETERS[endpoint]]
    right = {"model": "m", names[0]: TEXTS[names[0]]}
    assert parse_rider_request(json.dumps(right).encode(), endpoint).body == right
    more = st.dictionaries(st.sampled_from([*names, "odd"]), values, max_size=4)
    return more.map(lambda changes: (endpoint, right | changes))


@given(st.sampled_from(list(Endpoint)).flatmap(bodies_of))
def test_a_body_is_taken_or_refused_and_raises_nothing_else(
    asking: tuple[Endpoint, dict[str, Any]],
) -> None:
    endpoint, body = asking
    raw = json.dumps(body).encode()
    with contextlib.suppress(RequestError):
        asked = parse_rider_request(raw, endpoint)
        assert "stream" not in asked.body
        assert json.loads(json.dumps(asked.body)) == asked.body  # as the ledger keeps it


# -- waiting, without anybody at work ---------------------------------------------------------


@contextlib.contextmanager
def server_alone(folder: Path, redis_url: str, **settings: Any) -> Iterator[Running]:
    """Nobody is at work who would answer."""
    chosen = Settings(state_dir=folder, redis_url=f"{redis_url}?db=3", **settings)
    with serving(create_app(chosen)) as url, Redis.from_url(redis_url, db=3) as redis:
        redis.flushdb()
        ledger = Ledger.open(chosen.ledger_url)
        ledger.models.serve(Model(id=MODEL, created_at=5, max_context_tokens=64))
        files = STORES["folder"].open(chosen.files_dir)
        yield Running(url=url, ledger=ledger, files=files, redis=redis, state_dir=folder)
        ledger.close()


@pytest.fixture
def idle(tmp_path: Path, contract_redis_url: str) -> Iterator[Running]:
    """A server that lets two riders wait, for a moment."""
    with server_alone(
        tmp_path, contract_redis_url, rider_wait_s=2.0, max_riders=2, max_line_bytes=10_000
    ) as running:
        yield running


@pytest.fixture
def patient(tmp_path: Path, contract_redis_url: str) -> Iterator[Running]:
    """One that lets them wait for longer than a test takes."""
    with server_alone(tmp_path, contract_redis_url) as running:
        yield running


def test_a_rider_past_its_wait_is_told_so_once_and_its_row_is_gone(idle: Running) -> None:
    with strict_client(idle.url) as client, pytest.raises(openai.InternalServerError) as refusal:
        client.chat.completions.create(model=MODEL, messages=HI)
    assert refusal.value.status_code == 504
    assert refusal.value.code == "request_timeout"
    assert refusal.value.request.headers["x-stainless-retry-count"] == "0"
    wait_until(lambda: num_rows(idle) == 0)


def num_rows(running: Running) -> int:
    """Of riders, answered or not, whoever waits."""
    engine = create_engine(f"sqlite:///{running.state_dir / 'ledger.db'}")
    with engine.connect() as connection:
        found = int(connection.execute(text("select count(*) from riders")).scalar_one())
    engine.dispose()
    return found


def test_009_more_than_may_wait_are_told_to_come_again(idle: Running) -> None:
    with ThreadPoolExecutor(2) as pool, httpx2.Client(base_url=idle.url, timeout=60) as http:
        waiting = [pool.submit(http.post, CHAT, json=TINY) for _ in range(2)]
        wait_until(lambda: num_rows(idle) == 2)
        crowded = http.post(CHAT, json=TINY)
        assert (crowded.status_code, crowded.headers["retry-after"]) == (429, "5")
        assert crowded.headers["x-should-retry"] == "true"
        error = error_of(crowded)
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
        assert "limit is 2" in str(error["message"])
        assert [each.result().status_code for each in waiting] == [504, 504]
        later = pool.submit(http.post, CHAT, json=TINY)
        wait_until(lambda: num_rows(idle) == 1)  # there is room again
        later.result()


def test_a_body_longer_than_a_line_is_413(idle: Running) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 10_000}]}
    answer = httpx2.post(f"{idle.url}{CHAT}", json=body)
    assert answer.status_code == 413
    assert "10000 bytes" in str(error_of(answer)["message"])


def test_who_goes_away_takes_the_rider_along(patient: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(httpx2.post, f"{patient.url}{CHAT}", json=TINY, timeout=2.0)
        wait_until(lambda: num_rows(patient) == 1)
        assert isinstance(asking.exception(), httpx2.ReadTimeout)
    wait_until(lambda: num_rows(patient) == 0)


def test_a_server_that_stops_tells_its_riders_and_leaves_none_behind(
    tmp_path: Path, contract_redis_url: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with server_alone(tmp_path, contract_redis_url) as running:
            asking = pool.submit(httpx2.post, f"{running.url}{CHAT}", json=TINY, timeout=60)
            wait_until(lambda: num_rows(running) == 1)
        answer = asking.result()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "about to stop" in str(error_of(answer)["message"])
    assert num_rows(running) == 0


def test_a_ledger_that_cannot_be_written_is_503(
    patient: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OperationalError("insert secret", {}, Exception("disk full"))

    with monkeypatch.context() as patched:
        patched.setattr("jobs.ledger.riders.RiderRecords.exchange", fail)
        answer = httpx2.post(f"{patient.url}{CHAT}", json=TINY)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "secret" not in answer.text
