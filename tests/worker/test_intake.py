"""Validation: every kind of bad input with its code, refusals as lines, shards."""

import dataclasses
import json
import tracemalloc
from typing import Any

import pytest

from jobs.batch import BatchStatus, Endpoint
from jobs.line import Outcome
from tests.support.box import Box, chat_line, completion_line
from worker.context import IntakeContext
from worker.finalize import finalize_batch
from worker.grouping import num_shared
from worker.intake import validate_batch


def _line(index: int = 0, **changes: Any) -> str:
    fields = json.loads(completion_line(index)) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None})


def _body(**changes: Any) -> dict[str, Any]:
    fields = {"model": "tiny", "prompt": "hello", **changes}
    return {name: value for name, value in fields.items() if value is not None}


BAD_FILES: dict[str, tuple[bytes, list[tuple[str, int | None, str | None]]]] = {
    "nothing": (b"", [("empty_file", None, None)]),
    "blank lines": (b"\n \r\n\n", [("empty_file", None, None)]),
    "not JSON": (f"{_line()}\n{{oops\n".encode(), [("invalid_json_line", 2, None)]),
    "an array": (b"[1]\n", [("invalid_json_line", 1, None)]),
    "not UTF-8": (b'{"custom_id": "\xff"}\n', [("invalid_json_line", 1, None)]),
    "after blanks": (f"\n\n{_line()}\n\nx\n".encode(), [("invalid_json_line", 5, None)]),
    "keys missing": (
        b"{}\n",
        [
            ("missing_required_parameter", 1, "custom_id"),
            ("missing_required_parameter", 1, "method"),
            ("missing_required_parameter", 1, "url"),
            ("missing_required_parameter", 1, "body"),
        ],
    ),
    "a duplicate": (f"{_line()}\n{_line()}\n".encode(), [("duplicate_custom_id", 2, "custom_id")]),
    "two models": (
        f"{_line()}\n{_line(1, body=_body(model='other'))}\n".encode(),
        [("mismatched_model", 2, "body.model")],
    ),
    "an unknown model": (
        f"{_line(body=_body(model='other'))}\n".encode(),
        [("model_not_found", 1, "body.model")],
    ),
    "no model": (
        f"{_line(body={'prompt': 'x'})}\n".encode(),
        [("invalid_request", 1, "body.model")],
    ),
    "no prompt": (
        f"{_line(body={'model': 'tiny'})}\n".encode(),
        [("invalid_request", 1, "body.prompt")],
    ),
    "another url": (
        f"{_line(url='/v1/chat/completions')}\n".encode(),
        [("invalid_url", 1, "url")],
    ),
    "another method": (f"{_line(method='GET')}\n".encode(), [("invalid_method", 1, "method")]),
    "a stream": (
        f"{_line(body=_body(stream=True))}\n".encode(),
        [("streaming_unsupported", 1, "body.stream")],
    ),
    "too many lines": (
        "".join(f"{_line(index)}\n" for index in range(11)).encode(),
        [("request_limit_exceeded", None, None)],
    ),
    "a long line": (
        f"{_line(body=_body(prompt='x' * 3000))}\n{_line(1)}\n".encode(),
        [("line_too_long", 1, None)],
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_fails_the_whole_batch_with(kind: str, box: Box, context: IntakeContext) -> None:
    settings = dataclasses.replace(box.settings, max_batch_lines=10, max_line_bytes=2_000)
    content, expected = BAD_FILES[kind]
    batch_id = box.add(content)
    validate_batch(dataclasses.replace(context, settings=settings), batch_id)
    batch = box.batch(batch_id)
    assert batch.status is BatchStatus.FAILED
    assert [(fault.code, fault.line, fault.param) for fault in batch.errors] == expected
    assert batch.request_counts.total == 0
    assert not box.store.delete(batch.input_blob)


def test_faults_beyond_a_hundred_are_summed(box: Box, context: IntakeContext) -> None:
    batch_id = box.add(["x"] * 150)
    validate_batch(context, batch_id)
    errors = box.batch(batch_id).errors
    assert [fault.line for fault in errors[:100]] == list(range(1, 101))
    assert (len(errors), errors[100].line) == (101, None)
    assert errors[100].message.startswith("50 more")


def test_marks_blanks_and_line_ends_do_not_matter(box: Box, context: IntakeContext) -> None:
    raw = b"\xef\xbb\xbf" + f"{_line(0)}\r\n\r\n  \n{_line(1)}\n{_line(2)}".encode()
    batch_id = box.add(raw)
    validate_batch(context, batch_id)
    lines = box.ledger.lines.unsettled(batch_id, 0)
    assert [line.custom_id for line in lines] == ["c-0", "c-1", "c-2"]
    for line in lines:
        part = raw[line.offset_bytes : line.offset_bytes + line.num_bytes]
        assert json.loads(part)["custom_id"] == line.custom_id


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown parameter": ({"tempereture": 1}, "unknown_parameter", "tempereture"),
    "six likeliest": ({"logprobs": 6}, "integer_above_max_value", "logprobs"),
    "no sample": ({"n": 0}, "integer_below_min_value", "n"),
    "a suffix": ({"suffix": "."}, "unsupported_parameter", "suffix"),
    "a great penalty": ({"presence_penalty": 2.1}, "decimal_above_max_value", "presence_penalty"),
    "an empty prompt": ({"prompt": ["a", ""]}, "invalid_value", "prompt[1]"),
    "heat": ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
    "cold": ({"temperature": -1}, "decimal_below_min_value", "temperature"),
    "a truth for a number": ({"top_p": True}, "invalid_type", "top_p"),
    "less than none": ({"max_tokens": -1}, "integer_below_min_value", "max_tokens"),
    "half a token": ({"max_tokens": 1.5}, "invalid_type", "max_tokens"),
    "five stops": ({"stop": ["a"] * 5}, "array_above_max_length", "stop"),
    "a number to stop at": ({"stop": [1]}, "invalid_type", "stop[0]"),
    "half a pair": ({"prompt": "a\ud800"}, "invalid_value", "prompt"),
    "half a pair to stop at": ({"stop": ["a", "\udfff"]}, "invalid_value", "stop[1]"),
    "nothing to stop at": ({"stop": ""}, "invalid_value", "stop"),
    "more than max": ({"min_tokens": 3}, "integer_above_max_value", "min_tokens"),
    "an unknown token": ({"prompt": [1, 1_000]}, "invalid_value", "prompt[1]"),
    "a broken token": ({"prompt": [1, None]}, "invalid_type", "prompt[1]"),
    "a long prompt": ({"prompt": "x" * 300}, "context_length_exceeded", "prompt"),
    "a long answer": ({"max_tokens": 300}, "context_length_exceeded", "prompt"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_line_is_refused_for(kind: str, box: Box, context: IntakeContext) -> None:
    changes, code, param = REFUSED[kind]
    batch_id = box.add([completion_line(0), completion_line(1, **changes)])
    validate_batch(context, batch_id)
    batch = box.batch(batch_id)
    assert batch.status is BatchStatus.IN_PROGRESS
    assert (batch.request_counts.total, batch.request_counts.failed) == (2, 1)
    (row,) = [json.loads(row) for row in box.ledger.lines.rows(batch_id, [Outcome.FAILED])]
    assert row["response"]["status_code"] == 400
    assert row["error"] is None
    error = row["response"]["body"]["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert [line.index for line in box.ledger.lines.unsettled(batch_id, 0)] == [0]


REFUSED_CHATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a role": (
        {"messages": [{"role": "bot", "content": "x"}]},
        "invalid_value",
        "messages[0].role",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "unsupported_parameter",
        "messages[0].content[0].type",
    ),
    "no content": (
        {"messages": [{"role": "user"}]},
        "missing_required_parameter",
        "messages[0].content",
    ),
    "half a pair": (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        "invalid_value",
        "messages[0].content",
    ),
    "half a pair in a part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
        "invalid_value",
        "messages[0].content[0].text",
    ),
    "a schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"not": {}}},
            }
        },
        "invalid_value",
        "response_format",
    ),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "unsupported_parameter",
        "tools",
    ),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_tokens"),
    "its template": (
        {"messages": [{"role": "user", "content": "refuse me"}]},
        "invalid_value",
        "messages",
    ),
}


@pytest.mark.parametrize("kind", REFUSED_CHATS)
def test_a_chat_line_is_refused_for(kind: str, box: Box, context: IntakeContext) -> None:
    changes, code, param = REFUSED_CHATS[kind]
    batch_id = box.add([chat_line(0, **changes)], endpoint=Endpoint.CHAT_COMPLETIONS)
    validate_batch(context, batch_id)
    (row,) = [json.loads(row) for row in box.ledger.lines.rows(batch_id, [Outcome.FAILED])]
    error = row["response"]["body"]["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_values_that_ask_for_nothing_pass(box: Box, context: IntakeContext) -> None:
    chat = chat_line(
        0,
        n=1,
        logprobs=False,
        tools=None,
        frequency_penalty=0,
        response_format={"type": "text"},
        stream=False,
        user="me",
        metadata={"a": "b"},
        seed=-5,
        stop="x",
        max_completion_tokens=4,
        max_tokens=4,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a"}]},
            {"role": "tool", "content": "b", "tool_call_id": "t"},
        ],
    )
    batch_id = box.add([chat], endpoint=Endpoint.CHAT_COMPLETIONS)
    validate_batch(context, batch_id)
    assert len(box.ledger.lines.unsettled(batch_id, 0)) == 1


def test_the_context_refusal_names_the_numbers(box: Box, context: IntakeContext) -> None:
    batch_id = box.add([completion_line(0, prompt="x" * 300)])
    validate_batch(context, batch_id)
    (row,) = [json.loads(row) for row in box.ledger.lines.rows(batch_id, [Outcome.FAILED])]
    assert row["response"]["body"]["error"]["message"] == (
        "This model's maximum context length is 256 tokens. However, your prompt resulted in "
        "300 tokens. Please reduce the length of the prompt."
    )


def test_refused_lines_make_no_shards_of_their_own(box: Box, context: IntakeContext) -> None:
    good = [completion_line(index) for index in range(4)]
    bad = [completion_line(index, n=0) for index in range(10, 16)]
    batch_id = box.add([bad[0], *good, *bad[1:]])
    validate_batch(context, batch_id)
    assert box.ledger.lines.queued_shards(batch_id) == [0]
    assert box.queue.get_job_ids() == [f"shard-{batch_id}-0"]


def test_a_batch_with_nothing_to_run_completes_at_once(box: Box, context: IntakeContext) -> None:
    batch_id = box.add([completion_line(index, n=0) for index in range(3)])
    validate_batch(context, batch_id)
    finalize_batch(context, batch_id)
    batch = box.batch(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert batch.output_file_id is None
    assert len(box.rows(batch.error_file_id)) == 3


def test_only_a_few_shards_of_a_batch_are_queued(box: Box, context: IntakeContext) -> None:
    batch_id = box.add([completion_line(index) for index in range(200)])
    validate_batch(context, batch_id)
    assert len(box.queue) == box.settings.shards_ahead == 16
    validate_batch(context, batch_id)
    assert len(box.queue) == 16


def test_a_lost_input_fails_the_batch(box: Box, context: IntakeContext) -> None:
    batch_id = box.add([completion_line(0)])
    box.store.delete(f"input-{batch_id}")
    validate_batch(context, batch_id)
    assert box.batch(batch_id).status is BatchStatus.FAILED


def test_memory_per_line_is_small_whatever_the_prompts(box: Box, context: IntakeContext) -> None:
    settings = dataclasses.replace(box.settings, shard_lines=32)
    padding = "x" * 200
    batch_id = box.add(completion_line(index, prompt=padding) for index in range(10_000))
    tracemalloc.start()
    validate_batch(dataclasses.replace(context, settings=settings), batch_id)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert box.batch(batch_id).request_counts.total == 10_000
    assert peak / 10_000 < 1_000, f"{peak / 10_000:.0f} bytes a line"


def test_lines_are_summed_up_with_what_each_shares_with_the_one_before(
    box: Box, context: IntakeContext
) -> None:
    prompts = ["classify: dog", "classify: cat", "classify: cats", "x" * 300, "classify: cow"]
    content = [
        completion_line(index, prompt=prompt, max_tokens=7) for index, prompt in enumerate(prompts)
    ]
    validate_batch(context, box.add(content))
    (waiting,) = box.ledger.groups.waiting(context.model_id)
    assert waiting.num_open == sum(group.num_lines for group in waiting.groups) == 4
    assert sum(group.prompt_tokens for group in waiting.groups) == 13 + 13 + 14 + 13
    # The refused line is nobody's neighbour.
    assert sum(group.shared_tokens for group in waiting.groups) == 10 + 13 + 11
    assert sum(group.limit_tokens for group in waiting.groups) == 4 * 7


@pytest.mark.parametrize("first", [(), (1,), (1, 2, 3), (1, 2, 4, 5), (9, 2, 3)])
@pytest.mark.parametrize("second", [(), (1, 2), (1, 2, 3, 4, 5)])
def test_what_two_prompts_begin_with(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    expected = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        expected += 1
    assert num_shared(first, second) == expected
