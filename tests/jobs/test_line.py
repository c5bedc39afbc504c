"""Request lines: each fault with its code and words; and result lines that nothing can split."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.answers import Usage
from jobs.batch import Endpoint, LineFault
from jobs.line import (
    MAX_CUSTOM_ID_CHARACTERS,
    LineRecord,
    Outcome,
    completed_result,
    duplicate_fault,
    format_row,
    http_result,
    mismatched_model_fault,
    parse_request_line,
    refused_result,
    unknown_model_fault,
    unrun_result,
)

CHAT = Endpoint.CHAT_COMPLETIONS
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
GOOD: dict[str, Any] = {
    "custom_id": "r1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": BODY,
}
LINE = LineRecord(
    index=4, custom_id="r1", offset_bytes=0, num_bytes=1, num_prompt_tokens=1, shard_index=0
)


def faults_of(raw: bytes, endpoint: Endpoint = CHAT) -> list[LineFault]:
    parsed, faults = parse_request_line(raw, line=3, endpoint=endpoint)
    assert (parsed is None) == bool(faults)
    assert all(fault.line == 3 for fault in faults)
    return faults


def changed(**values: Any) -> bytes:
    return json.dumps({**GOOD, **values}).encode()


def without(key: str) -> bytes:
    return json.dumps({name: value for name, value in GOOD.items() if name != key}).encode()


def test_a_good_line_parses() -> None:
    parsed, faults = parse_request_line(changed(), line=1, endpoint=CHAT)
    assert faults == []
    assert parsed is not None
    assert (parsed.custom_id, parsed.body) == ("r1", BODY)


@pytest.mark.parametrize("key", ["custom_id", "method", "url", "body"])
def test_a_missing_key_is_named(key: str) -> None:
    assert faults_of(without(key)) == [
        LineFault(
            code="missing_required_parameter",
            message=f"Missing required parameter: '{key}'.",
            line=3,
            param=key,
        )
    ]


@pytest.mark.parametrize(
    ("raw", "code", "param", "words"),
    [
        (b"words", "invalid_json_line", None, "not parseable as valid JSON"),
        (b"", "invalid_json_line", None, "not parseable"),
        (b"[1]", "invalid_json_line", None, "not parseable"),
        (b'"text"', "invalid_json_line", None, "not parseable"),
        (b"\xff", "invalid_json_line", None, "not valid UTF-8"),
        (b'{"a":1,"a":2}', "invalid_json_line", None, "not parseable"),
        (changed(body=BODY | {"x": float("nan")}), "invalid_json_line", None, "not parseable"),
        (changed(body=BODY).replace(b'"Hi"', b"1e999"), "invalid_json_line", None, "not parse"),
        (b"[" * 100_000, "invalid_json_line", None, "not parseable"),
        (changed(custom_id=7), "invalid_type", "custom_id", "expected a string, but got an int"),
        (changed(custom_id=""), "missing_required_parameter", "custom_id", "'custom_id'"),
        (changed(custom_id="x" * 513), "string_above_max_length", "custom_id", "length 513"),
        (changed(custom_id="a\nb"), "invalid_value", "custom_id", "control characters"),
        (changed(custom_id="\ud800"), "invalid_value", "custom_id", "not allowed"),
        (changed(method="GET"), "invalid_method", "method", "Supported values are: 'POST'"),
        (changed(url="/v1/x"), "invalid_url", "url", "does not match the batch endpoint"),
        (changed(prio=1), "unknown_parameter", "prio", "Unknown parameter: 'prio'."),
        (changed(body=[]), "invalid_type", "body", "expected an object, but got an array"),
        (changed(body=None), "invalid_type", "body", "expected an object, but got null"),
        (changed(body={**BODY, "model": ""}), "invalid_request", "body.model", "Model parameter"),
        (changed(body={"model": "m"}), "invalid_request", "body.messages", "Messages parameter"),
        (changed(body={**BODY, "stream": True}), "streaming_unsupported", "body.stream", "Chat"),
    ],
)
def test_each_fault_has_its_code_and_words(
    raw: bytes, code: str, param: str | None, words: str
) -> None:
    (fault,) = faults_of(raw)
    assert (fault.code, fault.param) == (code, param)
    assert words in fault.message


def test_completions_need_a_prompt() -> None:
    raw = changed(url="/v1/completions", body={"model": "m", "prompt": ""})
    (fault,) = faults_of(raw, Endpoint.COMPLETIONS)
    assert (fault.code, fault.param) == ("invalid_request", "body.prompt")


def test_all_faults_of_a_line_are_told() -> None:
    assert {fault.param for fault in faults_of(changed(method="GET", url="/", custom_id=1))} == {
        "method",
        "url",
        "custom_id",
    }


def test_a_fault_quotes_no_more_than_a_little() -> None:
    name = "x" * 10**6
    (fault,) = faults_of(changed(**{name: 1}))
    for found in (
        fault,
        unknown_model_fault(name, line=3),
        mismatched_model_fault(name, line=3),
        duplicate_fault("x" * MAX_CUSTOM_ID_CHARACTERS, line=3),
    ):
        assert len(found.message) < 1_000
        assert len(found.param or "") < 1_000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(raw=st.binary(max_size=200))
def test_no_bytes_make_parsing_fail(raw: bytes) -> None:
    faults_of(raw)


@given(
    line=st.fixed_dictionaries(
        {}, optional=dict.fromkeys((*GOOD, "extra"), VALUES) | {"url": st.just(str(CHAT))}
    ),
    endpoint=st.sampled_from(Endpoint),
)
def test_no_json_makes_parsing_fail(line: dict[str, Any], endpoint: Endpoint) -> None:
    for fault in faults_of(json.dumps(line).encode(), endpoint):
        assert fault.code
        assert fault.message.endswith(".")


@given(text=st.text(alphabet=st.characters(), max_size=50))
def test_a_row_is_one_line_whatever_is_in_it(text: str) -> None:
    row = format_row(http_result("batch_1", LINE, status_code=200, body={"text": text}))
    assert row.splitlines() == [row]
    assert json.loads(row.encode())["response"]["body"]["text"] == text


def test_results_have_the_documented_shape() -> None:
    done = completed_result("b", LINE, body={"x": 1}, usage=Usage(input_tokens=1, output_tokens=2))
    row = json.loads(done.row)
    assert set(row) == {"id", "custom_id", "response", "error"}
    assert row["id"].startswith("batch_req_")
    assert row["error"] is None
    assert (row["response"]["status_code"], row["response"]["body"]) == (200, {"x": 1})
    error = {"message": "no", "type": "invalid_request_error", "param": None, "code": None}
    failed = json.loads(refused_result("b", LINE, status_code=400, error=error).row)
    assert failed["error"] is None
    assert failed["response"]["body"] == {"error": error}


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(Outcome.EXPIRED, "batch_expired"), (Outcome.CANCELLED, "batch_cancelled")],
)
def test_a_line_that_never_ran_has_no_response(outcome: Outcome, code: str) -> None:
    row = json.loads(unrun_result("b", LINE, outcome).row)
    assert row["response"] is None
    assert row["error"]["code"] == code


def test_ids_are_stable_and_differ_by_line_and_batch() -> None:
    def made(batch_id: str, index: int) -> str:
        line = LineRecord(
            index=index, custom_id="", offset_bytes=0, num_bytes=0, num_prompt_tokens=0,
            shard_index=0,
        )  # fmt: skip
        row: dict[str, str] = json.loads(unrun_result(batch_id, line, Outcome.EXPIRED).row)
        return row["id"]

    assert made("a", 1) == made("a", 1)
    assert len({made("a", 1), made("a", 2), made("b", 1)}) == 3
