"""`/v1/batches`: creation, its refusals, lists, and cancelling by the table of the contract."""

import json
from typing import Any, Final

import httpx2
import openai
import pytest
from openai import OpenAI
from redis import Redis
from rq import Queue

from jobs.answers import Usage
from jobs.batch import BatchStatus, Endpoint, LineFault
from jobs.line import ResultRecord, completed_result, refused_result
from jobs.queue import INTAKE_QUEUE
from tests.support.records import line_records
from tests.support.server import Running
from tests.support.wire import error_of

CHAT: Final = "/v1/chat/completions"
S = BatchStatus


@pytest.fixture
def file_id(client: OpenAI, lines: bytes) -> str:
    return client.files.create(file=lines, purpose="batch").id


def create(client: OpenAI, file_id: str, **more: Any) -> openai.types.Batch:
    return client.batches.create(
        input_file_id=file_id, endpoint=CHAT, completion_window="24h", **more
    )


def queued(redis: Redis) -> list[str]:
    return Queue(INTAKE_QUEUE, connection=redis).job_ids


def results(batch_id: str) -> list[ResultRecord]:
    made = line_records(3, shard_lines=3)
    done = [
        completed_result(
            batch_id, line, body={}, usage=Usage(input_tokens=7, cached_tokens=2, output_tokens=5)
        )
        for line in made[:2]
    ]
    return [*done, refused_result(batch_id, made[2], status_code=400, error={})]


def begin(running: Running, batch_id: str, refused: list[ResultRecord] | None = None) -> None:
    lines = line_records(3, shard_lines=3)
    assert running.ledger.lines.begin(batch_id, model="m", found=lines, refused=refused or [])


def test_a_new_batch_validates_and_its_bell_has_rung(
    client: OpenAI, running: Running, file_id: str
) -> None:
    batch = create(client, file_id, metadata={"job": "nightly"})
    assert (batch.status, batch.endpoint, batch.input_file_id) == ("validating", CHAT, file_id)
    assert batch.expires_at == batch.created_at + 86_400
    assert batch.metadata == {"job": "nightly"}
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 0, "completed": 0, "failed": 0}
    assert queued(running.redis) == [f"validate-{batch.id}"]
    assert client.batches.retrieve(batch.id) == batch


def test_progress_and_usage_are_those_of_the_results(
    client: OpenAI, running: Running, file_id: str
) -> None:
    batch = create(client, file_id)
    begin(running, batch.id)
    running.ledger.lines.record(results(batch.id))
    found = client.batches.retrieve(batch.id)
    assert found.request_counts is not None
    assert found.request_counts.model_dump() == {"total": 3, "completed": 2, "failed": 1}
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens) == (14, 10)
    assert found.usage.input_tokens_details.cached_tokens == 4
    assert found.usage.total_tokens == 24
    assert found.model == "m"


def test_a_failed_batch_lists_its_faults(client: OpenAI, running: Running, file_id: str) -> None:
    batch = create(client, file_id)
    faults = [LineFault(code="invalid_json_line", message="lone \ud800 surrogate", line=2)]
    assert running.ledger.batches.advance(batch.id, S.FAILED, errors=faults)
    found = client.batches.retrieve(batch.id)
    assert found.status == "failed"
    assert found.errors is not None
    assert found.errors.object == "list"
    assert found.errors.data is not None
    assert (found.errors.data[0].line, found.errors.data[0].code) == (2, "invalid_json_line")


def test_deleting_the_input_leaves_the_batch_its_snapshot(
    client: OpenAI, running: Running, file_id: str, lines: bytes
) -> None:
    batch = create(client, file_id)
    client.files.delete(file_id)
    with running.files.read(f"input-{batch.id}") as stream:
        assert stream.read() == lines


def test_a_dead_redis_does_not_fail_the_post(
    client: OpenAI, running: Running, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(Queue, "enqueue_call", refuse)
    batch = create(client, file_id)
    assert client.batches.retrieve(batch.id).status == "validating"
    assert client.batches.cancel(batch.id).status == "cancelling"


def test_a_record_that_cannot_be_committed_leaves_no_snapshot(
    http: httpx2.Client, running: Running, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("jobs.ledger.batches.BatchRecords.add", refuse)
    answer = http.post("/v1/batches", json=wanted(file_id))
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "server_error"
    assert "secret" not in answer.text
    assert running.blobs() == [file_id]
    assert queued(running.redis) == []


def wanted(file_id: str, **changed: Any) -> dict[str, Any]:
    return {
        "input_file_id": file_id,
        "endpoint": CHAT,
        "completion_window": "24h",
    } | changed


REFUSED: list[tuple[dict[str, Any], str, str | None, str]] = [
    ({"endpoint": "/v1/x"}, "endpoint", "invalid_value",
     "Invalid value: '/v1/x'. Supported values are: '/v1/chat/completions', '/v1/completions', '/v1/embeddings', and '/v1/responses'."),
    ({"endpoint": 7}, "endpoint", "invalid_type",
     "Invalid type for 'endpoint': expected a string, but got an integer instead."),
    ({"completion_window": "1h"}, "completion_window", "invalid_value",
     "Invalid value: '1h'. Supported values are: '24h'."),
    ({"completion_window": ""}, "completion_window", "invalid_value",
     "Invalid value: ''. Supported values are: '24h'."),
    ({"input_file_id": None}, "input_file_id", "invalid_type",
     "Invalid type for 'input_file_id': expected a string, but got null instead."),
    ({"input_file_id": ""}, "input_file_id", "missing_required_parameter",
     "Missing required parameter: 'input_file_id'."),
    ({"input_file_id": "file-none"}, "file_id", None, "Cannot find file file-none."),
    ({"input_file_id": "../../etc/passwd"}, "file_id", None, "Cannot find file ../../etc/passwd."),
    ({"prio": 1}, "prio", "unknown_parameter", "Unknown parameter: 'prio'."),
    ({"\ud800": 1}, "\ud800", "unknown_parameter", "Unknown parameter: '\ud800'."),
    ({"metadata": []}, "metadata", "invalid_type",
     "Invalid type for 'metadata': expected an object, but got an array instead."),
    ({"metadata": {"tags": ["a"]}}, "metadata.tags", "invalid_type",
     "Invalid type for 'metadata.tags': expected a string, but got an array instead."),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "object_above_max_properties",
     ("Invalid 'metadata': too many properties. Expected an object with at most 16 properties, "
     "but got an object with 17 properties instead.")),
    ({"metadata": {"k": "v" * 513}}, "metadata.k", "string_above_max_length",
     ("Invalid 'metadata.k': string too long. Expected a string with maximum length 512, "
     "but got a string with length 513 instead.")),
    ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 65, "string_above_max_length",
     (f"Invalid 'metadata.{'k' * 65}': string too long. Expected a string with maximum length 64, "
     "but got a string with length 65 instead.")),
    ({"metadata": {"k": "\udfff"}}, "metadata", "invalid_value",
     "Invalid 'metadata': a lone surrogate is not a character."),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}},
     "output_expires_after.seconds", "integer_below_min_value",
     ("Invalid 'output_expires_after.seconds': integer below minimum value. "
     "Expected a value >= 3600, but got 3599 instead.")),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 2592001}},
     "output_expires_after.seconds", "integer_above_max_value",
     ("Invalid 'output_expires_after.seconds': integer above maximum value. "
     "Expected a value <= 2592000, but got 2592001 instead.")),
    ({"output_expires_after": {"anchor": "created_at", "seconds": "3600"}},
     "output_expires_after.seconds", "invalid_type",
     ("Invalid type for 'output_expires_after.seconds': expected an integer, "
     "but got a string instead.")),
    ({"output_expires_after": {"anchor": "now", "seconds": 3600}},
     "output_expires_after.anchor", "invalid_value",
     "Invalid value: 'now'. Supported values are: 'created_at'."),
    ({"output_expires_after": {"seconds": 3600}}, "output_expires_after.anchor",
     "missing_required_parameter", "Missing required parameter: 'output_expires_after.anchor'."),
    ({"output_expires_after": 5}, "output_expires_after", "invalid_type",
     "Invalid type for 'output_expires_after': expected an object, but got an integer instead."),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "param", "code", "message"), REFUSED)
def test_wrong_requests_are_refused_in_the_contracts_words(
    http: httpx2.Client,
    running: Running,
    file_id: str,
    changed: dict[str, Any],
    param: str,
    code: str | None,
    message: str,
) -> None:
    body = json.dumps(wanted(file_id, **changed))
    answer = http.post("/v1/batches", content=body)
    error = error_of(answer)
    assert answer.status_code == 400
    assert (error["message"], error["param"], error["code"]) == (message, param, code)
    assert error["type"] == "invalid_request_error"
    assert running.ledger.batches.page(limit=1).items == []
    assert running.blobs() == [file_id]


def test_a_body_of_megabytes_is_413(http: httpx2.Client) -> None:
    answer = http.post("/v1/batches", content=b" " * 2_000_000)
    assert answer.status_code == 413
    assert "1048576" in str(error_of(answer)["message"])


def test_null_options_are_as_if_not_given(client: OpenAI, file_id: str) -> None:
    extra = {"metadata": None, "output_expires_after": None}
    assert create(client, file_id, extra_body=extra).metadata is None


def test_output_expiry_reaches_the_record(client: OpenAI, running: Running, file_id: str) -> None:
    policy = {"anchor": "created_at", "seconds": 7_200}
    batch = create(client, file_id, output_expires_after=policy)
    kept = running.ledger.batches.get(batch.id).output_expires_after
    assert kept is not None
    assert kept.seconds == 7_200


def test_every_endpoint_is_accepted(client: OpenAI, file_id: str) -> None:
    for endpoint in Endpoint:
        batch = client.batches.create(
            input_file_id=file_id, endpoint=endpoint.value, completion_window="24h"
        )
        assert batch.endpoint == endpoint


def reach(running: Running, batch_id: str, status: BatchStatus) -> None:
    """Bring a new batch to `status` by legal moves."""
    if status in (S.FINALIZING, S.COMPLETED, S.IN_PROGRESS):
        begin(running, batch_id)
    path = {
        S.COMPLETED: [S.FINALIZING, S.COMPLETED],
        S.CANCELLED: [S.CANCELLING, S.CANCELLED],
        S.VALIDATING: [],
        S.IN_PROGRESS: [],
    }
    for step in path.get(status, [status]):
        assert running.ledger.batches.advance(batch_id, step)


@pytest.mark.parametrize("status", [S.VALIDATING, S.IN_PROGRESS])
def test_a_running_batch_is_cancelled_and_rung_for(
    client: OpenAI, running: Running, file_id: str, status: BatchStatus
) -> None:
    batch = create(client, file_id)
    reach(running, batch.id, status)
    cancelled = client.batches.cancel(batch.id)
    assert cancelled.status == "cancelling"
    assert cancelled.cancelling_at is not None
    assert f"finalize-{batch.id}" in queued(running.redis)


@pytest.mark.parametrize("status", [S.CANCELLING, S.CANCELLED])
def test_cancelling_twice_changes_nothing(
    client: OpenAI, running: Running, file_id: str, status: BatchStatus
) -> None:
    batch = create(client, file_id)
    reach(running, batch.id, status)
    before = client.batches.retrieve(batch.id)
    assert client.batches.cancel(batch.id) == before


@pytest.mark.parametrize("batch_id", ["batch_none", "..%2F..%2Fetc", "%F0%9F%98%80"])
def test_an_unknown_batch_is_404(http: httpx2.Client, batch_id: str) -> None:
    for answer in (
        http.get(f"/v1/batches/{batch_id}"),
        http.post(f"/v1/batches/{batch_id}/cancel"),
    ):
        assert answer.status_code == 404
        error_of(answer)


def test_an_unknown_batch_is_named(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="No batch found with id 'batch_none'"):
        client.batches.retrieve("batch_none")
