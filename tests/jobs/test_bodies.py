"""Bodies: what they may ask is kept, and the rest is refused by name, where it stands."""

from typing import Any

import pytest

from jobs.batch import Endpoint
from jobs.bodies import Ask, parse_body
from jobs.embeddings import EmbeddingAsk, num_inputs
from jobs.errors import InvalidRequestError
from jobs.parameters import PARAMETERS, Parameter, Support

COMPLETIONS = Endpoint.COMPLETIONS
CHAT = Endpoint.CHAT_COMPLETIONS
EMBEDDINGS = Endpoint.EMBEDDINGS
RESPONSES = Endpoint.RESPONSES
HALF = "a\ud800b"


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"} | fields]}


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (COMPLETIONS, {"prompt": HALF}, "prompt"),
        (COMPLETIONS, {"prompt": [HALF]}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "stop": HALF}, "stop"),
        (COMPLETIONS, {"prompt": "x", "stop": ["y", HALF]}, "stop[1]"),
        (COMPLETIONS, {"prompt": "x", "stop": ""}, "stop"),
        (COMPLETIONS, {"prompt": "x", "stop": ["y", ""]}, "stop[1]"),
        (CHAT, message(content=HALF), "messages[0].content"),
        (CHAT, message(content=[{"type": "text", "text": HALF}]), "messages[0].content[0].text"),
        (CHAT, message(name=HALF), "messages[0].name"),
    ],
)
def test_text_that_no_tokenizer_can_use_is_refused(
    endpoint: Endpoint, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        parse_body({"model": "m"} | body, endpoint)
    assert (refusal.value.code, refusal.value.param) == ("invalid_value", param)
    assert refusal.value.message.isascii()


def test_a_whole_pair_and_every_stop_are_kept() -> None:
    ask = parse_body(
        {"model": "m", "prompt": "\U0001f600", "stop": ["\U0001f600", "b"]}, COMPLETIONS
    )
    assert (ask.prompts, ask.stop) == (("\U0001f600",), ("\U0001f600", "b"))


@pytest.mark.parametrize("body", [{"x" * 10**6: 1}, message(**{"x" * 10**6: 1})])
def test_a_refusal_quotes_no_more_than_a_little(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        parse_body({"model": "m", "messages": []} | body, CHAT)
    assert len(refusal.value.message) < 1_000
    assert len(refusal.value.param or "") < 1_000


def plain(endpoint: Endpoint) -> dict[str, Any]:
    own = {CHAT: message(), COMPLETIONS: {"prompt": "x"}}
    return {"model": "m"} | own.get(endpoint, {"input": "x"})


REFUSED = [
    (endpoint, each)
    for endpoint, table in PARAMETERS.items()
    for each in table
    if each.support is Support.REFUSED
]


@pytest.mark.parametrize(("endpoint", "parameter"), REFUSED)
def test_what_is_refused_is_refused_by_its_name(endpoint: Endpoint, parameter: Parameter) -> None:
    for neutral in (None, *parameter.neutral):
        parse_body(plain(endpoint) | {parameter.name: neutral}, endpoint)
    with pytest.raises(InvalidRequestError) as refusal:
        parse_body(plain(endpoint) | {parameter.name: {"anything": 1}}, endpoint)
    assert (refusal.value.code, refusal.value.param) == ("unsupported_parameter", parameter.name)


ASKED: dict[str, tuple[object, object]] = {
    "temperature": (0, 0.0),
    "top_p": (0.5, 0.5),
    "frequency_penalty": (-2, -2.0),
    "presence_penalty": (2, 2.0),
    "logit_bias": ({"7": -100, "12": 1.5}, ((7, -100.0), (12, 1.5))),
    "n": (128, 128),
    "seed": (-5, -5),
    "stop": ("a", ("a",)),
    "top_k": (4, 4),
    "min_p": (0.1, 0.1),
    "repetition_penalty": (1.2, 1.2),
    "min_tokens": (2, 2),
    "ignore_eos": (True, True),
    "stop_token_ids": ([4, 5], (4, 5)),
    "max_tokens": (9, 9),
}


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_is_kept(endpoint: Endpoint, name: str) -> None:
    value, expected = ASKED[name]
    ask = parse_body(plain(endpoint) | {name: value}, endpoint)
    assert getattr(ask, name) == expected != getattr(parse_body(plain(endpoint), endpoint), name)


@pytest.mark.parametrize("endpoint", Endpoint)
def test_every_honoured_parameter_is_looked_at(endpoint: Endpoint) -> None:
    for each in PARAMETERS[endpoint]:
        body = plain(endpoint) | {each.name: object()}
        if each.support is Support.HONOURED and each.name != "model":
            with pytest.raises(InvalidRequestError) as refusal:
                parse_body(body, endpoint)
            assert (refusal.value.param or "").startswith(each.name)
        elif each.support is Support.WITHOUT_EFFECT:
            assert parse_body(body, endpoint) == parse_body(plain(endpoint), endpoint)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "decimal_above_max_value", "logit_bias.1"),
        ({"logit_bias": [1]}, "invalid_type", "logit_bias"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
        ({"n": 129}, "integer_above_max_value", "n"),
        ({"frequency_penalty": -2.5}, "decimal_below_min_value", "frequency_penalty"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "invalid_value",
            "response_format.json_schema.name",
        ),
        (message(role="bot"), "invalid_value", "messages[0].role"),
        (
            message(content=[{"type": "input_audio"}]),
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        (
            message(role="assistant", audio={"id": "a"}),
            "unsupported_parameter",
            "messages[0].audio",
        ),
        (message(role="tool"), "missing_required_parameter", "messages[0].tool_call_id"),
        (
            message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "["}}]),
            "invalid_value",
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_chat_is_refused_for(changes: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        parse_body(plain(CHAT) | changes, CHAT)
    assert (refusal.value.code, refusal.value.param) == (code, param)


def test_messages_of_all_roles_become_text() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "user", "content": "hi", "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": None, "refusal": "no"},
    ]
    ask = parse_body({"model": "m", "messages": messages}, CHAT)
    assert ask.messages is not None
    assert [each["content"] for each in ask.messages] == ["ab", "hi", "", "42", "no"]
    assert ask.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, {}),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "null"}, "strict": True},
            },
            {"type": "null"},
        ),
    ],
)
def test_a_format_is_a_schema(given: object, schema: object) -> None:
    assert parse_body(plain(CHAT) | {"response_format": given}, CHAT).schema == schema


def test_prompts_are_scored_by_an_echo_with_logprobs() -> None:
    def ask(**asked: Any) -> Ask:
        return parse_body(plain(COMPLETIONS) | asked, COMPLETIONS)

    assert ask(echo=True, logprobs=0).scores_prompts
    assert not ask(echo=True).scores_prompts
    assert not ask(logprobs=5).scores_prompts
    assert ask(max_tokens=0, n=3, best_of=4).num_texts == 1
    assert (ask(max_tokens=0).max_tokens, ask(max_tokens=None).max_tokens) == (0, 16)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"input": ""}, "invalid_value", "input"),
        ({"input": ["a", ""]}, "invalid_value", "input[1]"),
        ({"input": [[1], []]}, "invalid_value", "input[1]"),
        ({"input": {"text": "a"}}, "invalid_type", "input"),
        ({"input": ["a", 1]}, "invalid_type", "input[1]"),
        ({"input": [1, "a"]}, "invalid_type", "input[0]"),
        ({"input": HALF}, "invalid_value", "input"),
        ({"input": ["a"] * 2049}, "array_above_max_length", "input"),
        ({"encoding_format": "hex"}, "invalid_value", "encoding_format"),
        ({"pooling": "first"}, "invalid_value", "pooling"),
        ({"dimensions": 0}, "integer_below_min_value", "dimensions"),
        ({"max_tokens": 1}, "unknown_parameter", "max_tokens"),
    ],
)
def test_an_embedding_is_refused_for(changes: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        parse_body(plain(EMBEDDINGS) | changes, EMBEDDINGS)
    assert (refusal.value.code, refusal.value.param) == (code, param)


def test_inputs_are_texts_or_tokens_one_or_many() -> None:
    for given, expected in [("x", 1), ([1, 2], 1), ([[1, 2]], 1), (["a", "b"], 2), ([[1], [2]], 2)]:
        body = plain(EMBEDDINGS) | {"input": given}
        ask = parse_body(body, EMBEDDINGS)
        assert len(ask.prompts) == num_inputs(body) == expected
        assert (ask.max_tokens, ask.embedding) == (0, EmbeddingAsk())


def test_the_best_are_of_as_many_or_more() -> None:
    def best_of(**asked: int) -> int | None:
        return parse_body(plain(COMPLETIONS) | asked, COMPLETIONS).best_of

    assert (best_of(), best_of(n=2, best_of=2), best_of(n=2, best_of=5)) == (None, None, 5)
    with pytest.raises(InvalidRequestError) as refusal:
        best_of(n=3, best_of=2)
    assert refusal.value.param == "best_of"


def test_prompts_are_text_or_tokens_one_or_many() -> None:
    for prompt, expected in [
        ("x", ("x",)),
        ([1, 2], ((1, 2),)),
        ([[1, 2]], ((1, 2),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ]:
        assert parse_body(plain(COMPLETIONS) | {"prompt": prompt}, COMPLETIONS).prompts == expected


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            "unsupported_parameter",
            "input[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "unsupported_parameter",
            "input[0].content[0].type",
        ),
        ({"max_output_tokens": 15}, "integer_below_min_value", "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"text": {"verbosity": "high"}}, "unsupported_parameter", "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format.type"),
        (
            {"text": {"format": {"type": "json_schema"}}},
            "missing_required_parameter",
            "text.format.name",
        ),
        ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
        ({"n": 2}, "unknown_parameter", "n"),
    ],
)
def test_a_response_is_refused_for(changes: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        parse_body(plain(RESPONSES) | changes, RESPONSES)
    assert (refusal.value.code, refusal.value.param) == (code, param)


def test_a_responses_items_are_a_chats_messages() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "b", "annotations": []}],
        },
    ]
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "null"}, "strict": True}
    asked = {"input": items, "instructions": "be brief", "text": {"format": schema}}
    ask = parse_body({"model": "m"} | asked, RESPONSES)
    assert ask.messages is not None
    assert [(each["role"], each["content"]) for each in ask.messages] == [
        ("system", "be brief"),
        ("user", "a"),
        ("assistant", "b"),
    ]
    assert ask.schema == {"type": "null"}
