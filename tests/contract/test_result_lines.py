"""Checklist 117 to 122: result files line by line."""

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from jobs.answers import Usage
from jobs.line import LineRecord, completed_result
from tests.support.box import chat_line, completion_line
from tests.support.service import CHAT, Service

ODD = "ü 😀 \u2028 \u2029 \x85 \n"


@pytest.fixture(scope="module")
def files(service: Service) -> list[str]:
    """The output and error file of a batch whose lines have odd names."""
    lines = [json.loads(completion_line(index)) for index in range(4)]
    lines[1]["custom_id"] = ODD.strip()
    lines[2]["body"]["max_tokens"] = -1
    batch = service.run([json.dumps(line) for line in lines])
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    content = service.client.files.content
    return [content(batch.output_file_id).text, content(batch.error_file_id).text]


def rows_of(files: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for text in files for line in text.split("\n")[:-1]]


def test_117_every_line_has_four_keys_and_an_id(files: list[str]) -> None:
    rows = rows_of(files)
    assert all(list(row) == ["id", "custom_id", "response", "error"] for row in rows)
    assert len({row["id"] for row in rows}) == 4
    assert all(row["id"].startswith("batch_req_") for row in rows)


def test_118_a_response_has_a_body_a_status_and_an_id(files: list[str]) -> None:
    for row in rows_of(files):
        assert set(row["response"]) == {"status_code", "request_id", "body"}
        assert isinstance(row["response"]["body"], dict)
        assert row["response"]["status_code"] in (200, 400)
        assert isinstance(row["response"]["request_id"], str)


def test_119_a_refusal_is_in_the_body(files: list[str]) -> None:
    (row,) = rows_of(files[1:])
    assert row["error"] is None
    assert set(row["response"]["body"]) == {"error"}
    assert set(row["response"]["body"]["error"]) == {"message", "type", "param", "code"}


def test_120_bodies_are_what_the_client_knows(service: Service, files: list[str]) -> None:
    for row in rows_of(files[:1]):
        Completion.model_validate(row["response"]["body"], strict=True)
    batch = service.run([chat_line(0, max_tokens=3)], endpoint=CHAT)
    (row,) = service.rows(batch.output_file_id)
    ChatCompletion.model_validate(row["response"]["body"], strict=True)


def test_121_all_characters_survive_and_none_splits_a_line(files: list[str]) -> None:
    assert ODD.strip() in [row["custom_id"] for row in rows_of(files)]
    assert "😀" in files[0]
    for text in files:
        assert text.splitlines() == text.split("\n")[:-1]
    line = LineRecord(
        index=0, custom_id=ODD, offset_bytes=0, num_bytes=1, num_prompt_tokens=1, shard_index=0
    )
    result = completed_result(
        "b", line, body={"text": ODD}, usage=Usage(input_tokens=1, output_tokens=1)
    )
    assert len(result.row.splitlines()) == 1
    assert json.loads(result.row)["response"]["body"]["text"] == ODD


def test_122_every_line_is_json_and_ends(files: list[str]) -> None:
    for text in files:
        assert text.endswith("\n")
        assert all(json.loads(line) for line in text.splitlines())
