"""Checklist 67 to 83: what fails a whole batch, in whose words, on which line."""

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.batch import Endpoint
from tests.support.box import chat_line, completion_line
from tests.support.service import CHAT, Service, faults_of
from worker.input_lines import InputLine
from worker.inspection import Inspection


def line(index: int = 0, **changes: Any) -> str:
    """A line with fields changed; None takes one away."""
    fields = json.loads(completion_line(index)) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None})


def body(**changes: Any) -> dict[str, Any]:
    fields = {"model": "tiny", "prompt": "hello", **changes}
    return {name: value for name, value in fields.items() if value is not None}


def failed(service: Service, *lines: str | bytes, endpoint: str = "/v1/completions") -> Any:
    """The batch of those lines, which must fail as the contract says."""
    raw = b"\n".join(each.encode() if isinstance(each, str) else each for each in lines)
    num_submitted = len(service.box.submitted())
    batch = service.run(raw, endpoint=endpoint)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at is not None
    assert batch.in_progress_at is None
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 0, "completed": 0, "failed": 0}
    assert len(service.box.submitted()) == num_submitted
    return batch


def message_of(batch: Any) -> str:
    return str(batch.errors.data[0].message)


def test_067_a_line_that_is_no_json(service: Service) -> None:
    batch = failed(service, line(), "{oops", line(1))
    assert faults_of(batch) == [("invalid_json_line", 2, None)]
    assert message_of(batch) == "This line is not parseable as valid JSON."


def test_068_missing_keys_are_named_line_by_line(service: Service) -> None:
    names = ["custom_id", "method", "url", "body"]
    batch = failed(service, *(line(at, **{name: None}) for at, name in enumerate(names)))
    assert faults_of(batch) == [
        ("missing_required_parameter", at, name) for at, name in enumerate(names, start=1)
    ]
    assert message_of(batch) == "Missing required parameter: 'custom_id'."


def test_069_a_duplicate_is_the_later_line(service: Service) -> None:
    batch = failed(service, line(7), line(8), line(7))
    assert faults_of(batch) == [("duplicate_custom_id", 3, "custom_id")]
    assert "'c-7'" in message_of(batch)


def test_070_a_second_model(service: Service) -> None:
    batch = failed(service, line(), line(1, body=body(model="other")))
    assert faults_of(batch) == [("mismatched_model", 2, "body.model")]


def test_071_another_url(service: Service) -> None:
    batch = failed(service, line(url=CHAT))
    assert faults_of(batch) == [("invalid_url", 1, "url")]
    assert message_of(batch) == (
        "The URL provided for this request does not match the batch endpoint."
    )


def test_072_another_method(service: Service) -> None:
    assert faults_of(failed(service, line(method="GET"))) == [("invalid_method", 1, "method")]


def test_073_an_unknown_model(service: Service) -> None:
    batch = failed(service, line(body=body(model="gpt-9")))
    assert faults_of(batch) == [("model_not_found", 1, "body.model")]
    assert message_of(batch) == "The provided model 'gpt-9' is not supported by the Batch API."


def test_074_what_every_body_needs(service: Service) -> None:
    batch = failed(service, line(body=body(model=None)), line(1, body=body(prompt=None)))
    assert faults_of(batch) == [
        ("invalid_request", 1, "body.model"),
        ("invalid_request", 2, "body.prompt"),
    ]
    assert message_of(batch) == "Model parameter is required."
    chat = failed(service, chat_line(0, messages=[]), endpoint=CHAT)
    assert faults_of(chat) == [("invalid_request", 1, "body.messages")]
    assert message_of(chat) == "Messages parameter is required."


def test_075_one_stream_fails_all(service: Service) -> None:
    batch = failed(service, chat_line(0), chat_line(1, stream=True), endpoint=CHAT)
    assert faults_of(batch) == [("streaming_unsupported", 2, "body.stream")]
    assert message_of(batch) == "Chat Completions: Streaming is not supported in the Batch API."


def test_076_blank_lines_are_no_requests(service: Service) -> None:
    batch = failed(service, "", " \r", "")
    assert faults_of(batch) == [("empty_file", None, None)]
    assert message_of(batch).startswith("The input file is empty.")


def inspected(num_lines: int) -> list[tuple[str, int | None]]:
    """What is found in that many good lines under the default limits."""
    inspection = Inspection(
        endpoint=Endpoint.COMPLETIONS,
        served_model="tiny",
        max_lines=50_000,
        max_line_bytes=10 * 2**20,
    )
    head, tail = completion_line(0).split("c-0")

    def lines() -> Iterator[InputLine]:
        for index in range(num_lines):
            raw = f"{head}c-{index}{tail}".encode()
            yield InputLine(number=index + 1, offset_bytes=0, raw=raw)

    return [(fault.code, fault.line) for fault in inspection.look(lines())]


def test_077_fifty_thousand_lines_and_no_more() -> None:
    assert inspected(50_000) == []
    assert inspected(50_001) == [("request_limit_exceeded", None)]


def embedding_line(index: int, num_inputs: int) -> str:
    inputs: object = [f"text {at}" for at in range(num_inputs)] if num_inputs else "text"
    fields = {"url": "/v1/embeddings", "body": {"model": "tiny", "input": inputs}}
    return json.dumps(json.loads(completion_line(index)) | fields)


@pytest.mark.parametrize(("num_more", "code"), [(0, None), (1, "embedding_input_limit_exceeded")])
def test_078_fifty_thousand_inputs_over_all_lines_and_no_more(
    num_more: int, code: str | None
) -> None:
    inspection = Inspection(
        endpoint=Endpoint.EMBEDDINGS,
        served_model="tiny",
        max_lines=50_000,
        max_line_bytes=10 * 2**20,
    )
    counts = [2_000] * 24 + [1_999, 0, *[1] * num_more]
    faults = inspection.look(
        InputLine(number=at + 1, offset_bytes=0, raw=embedding_line(at, count).encode())
        for at, count in enumerate(counts)
    )
    assert inspection.num_inputs == 50_000 + num_more
    assert [(fault.code, fault.line) for fault in faults] == ([(code, None)] if code else [])


def test_079_marks_line_ends_and_blanks_do_not_matter(service: Service) -> None:
    raw = b"\xef\xbb\xbf" + f"{line(0)}\r\n\r\n  \n{line(1)}\n{line(2)}".encode()
    batch = service.run(raw)
    assert batch.status == "completed"
    ids = [row["custom_id"] for row in service.rows(batch.output_file_id)]
    assert ids == ["c-0", "c-1", "c-2"]
    late = failed(service, b"\xef\xbb\xbf" + line(0).encode(), "", "\r", "oops")
    assert faults_of(late) == [("invalid_json_line", 4, None)]


def test_080_what_is_no_object_in_utf8(service: Service) -> None:
    batch = failed(service, "[1]", '"text"', b'{"custom_id": "\xff"}', "null", '{"a": NaN}')
    assert faults_of(batch) == [("invalid_json_line", at, None) for at in range(1, 6)]


def test_081_errors_are_a_list_by_line_with_an_end(service: Service) -> None:
    batch = failed(service, "{}", *["[]"] * 149)
    assert batch.errors.object == "list"
    lines = [error.line for error in batch.errors.data]
    assert lines[:100] == [1, 1, 1, 1, *range(2, 98)]
    assert (len(lines), lines[100]) == (101, None)
    assert batch.errors.data[100].code == "too_many_errors"
    assert batch.errors.data[100].message == "53 more errors were found and are not listed."


def test_082_no_error_tells_a_prompt(service: Service) -> None:
    secret = "the secret prompt"
    spoiled = [
        line(0, body=body(prompt=secret, model="other")),
        line(0, body=body(prompt=secret, stream=True)),
        line(0, method=secret, body=body(prompt=secret)),
        line(0, url=secret),
        line(1, body=[secret]),
        line(2, custom_id=[secret]),
        f'{{"custom_id": "{secret}',
    ]
    assert secret not in failed(service, *spoiled).model_dump_json()


@pytest.mark.parametrize("num_bytes", [300, 3_000])
def test_083_memory_depends_on_the_lines_not_on_their_length(num_bytes: int) -> None:
    tracemalloc.start()
    inspection = Inspection(
        endpoint=Endpoint.COMPLETIONS,
        served_model="tiny",
        max_lines=50_000,
        max_line_bytes=10 * 2**20,
    )
    found = inspection.look(
        InputLine(
            number=index + 1,
            offset_bytes=0,
            raw=completion_line(index, prompt="x" * num_bytes).encode(),
        )
        for index in range(5_000)
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == []
    assert peak / 5_000 < 400
