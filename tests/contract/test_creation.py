"""Checklist 54 to 65: `POST /v1/batches` and its refusals."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types import Batch
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.batch import BatchStatus, Endpoint, LineFault
from jobs.settings import Settings
from server.app import create_app
from tests.support.box import completion_line
from tests.support.server import Running, serving
from tests.support.service import COMPLETIONS, Service
from tests.support.wire import error_of

S = BatchStatus
PATHS: dict[BatchStatus, list[BatchStatus]] = {
    S.VALIDATING: [],
    S.FAILED: [S.FAILED],
    S.IN_PROGRESS: [S.IN_PROGRESS],
    S.FINALIZING: [S.IN_PROGRESS, S.FINALIZING],
    S.COMPLETED: [S.IN_PROGRESS, S.FINALIZING, S.COMPLETED],
    S.EXPIRED: [S.EXPIRED],
    S.CANCELLING: [S.CANCELLING],
    S.CANCELLED: [S.CANCELLING, S.CANCELLED],
}
KEYS = {
    *("id", "object", "endpoint", "model", "errors", "input_file_id", "completion_window"),
    *("status", "output_file_id", "error_file_id", "created_at", "in_progress_at", "expires_at"),
    *("finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at"),
    *("cancelled_at", "request_counts", "usage", "metadata"),
}

OURS = {"progress", "priority", "webhook", "retry_of"}


def create(client: OpenAI, file_id: str, **more: Any) -> Batch:
    wish: dict[str, Any] = {"endpoint": COMPLETIONS, "completion_window": "24h"}
    return client.batches.create(input_file_id=file_id, **wish | more)


def wish(file_id: str, **changed: Any) -> dict[str, Any]:
    return {
        "input_file_id": file_id,
        "endpoint": COMPLETIONS,
        "completion_window": "24h",
    } | changed


def test_054_a_new_batch_is_validating(client: OpenAI, file_id: str) -> None:
    batch = create(client, file_id)
    assert (batch.status, batch.input_file_id, batch.endpoint) == (
        "validating",
        file_id,
        COMPLETIONS,
    )
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 0, "completed": 0, "failed": 0}
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert batch.expires_at == batch.created_at + 86_400


@pytest.mark.parametrize("status", PATHS)
def test_055_every_key_is_there_in_every_status(
    client: OpenAI, http: httpx2.Client, running: Running, status: BatchStatus
) -> None:
    file_id = client.files.create(file=b"{}", purpose="batch").id
    batch = create(client, file_id)
    for step in PATHS[status]:
        faults = [LineFault(code="empty_file", message="empty")] if step is S.FAILED else []
        assert running.ledger.batches.advance(batch.id, step, errors=faults)
    assert client.batches.retrieve(batch.id).status == status
    found = http.get(f"/v1/batches/{batch.id}").json()
    assert set(found) == KEYS | {"output_expires_after"} | OURS
    assert set(found["usage"]) == {
        *("input_tokens", "input_tokens_details", "output_tokens", "output_tokens_details"),
        "total_tokens",
    }


@pytest.mark.parametrize("name", ["input_file_id", "endpoint", "completion_window"])
def test_056_a_missing_field_is_named(http: httpx2.Client, name: str) -> None:
    body = {key: value for key, value in wish("file-x").items() if key != name}
    error = error_of(http.post("/v1/batches", json=body))
    assert error["message"] == f"Missing required parameter: '{name}'."
    assert (error["param"], error["code"]) == (name, "missing_required_parameter")


def test_057_a_bad_endpoint_is_told_the_good_ones(http: httpx2.Client, file_id: str) -> None:
    error = error_of(http.post("/v1/batches", json=wish(file_id, endpoint="/v1/x")))
    assert (error["param"], error["code"]) == ("endpoint", "invalid_value")
    assert str(error["message"]).startswith("Invalid value: '/v1/x'. Supported values are: '/v1/")
    assert all(endpoint in str(error["message"]) for endpoint in Endpoint)


@pytest.mark.parametrize("window", ["1h", "48h", "", "abc"])
def test_058_only_24h_is_a_window(http: httpx2.Client, file_id: str, window: str) -> None:
    error = error_of(http.post("/v1/batches", json=wish(file_id, completion_window=window)))
    assert (error["param"], error["code"]) == ("completion_window", "invalid_value")
    assert error["message"] == f"Invalid value: '{window}'. Supported values are: '24h'."


@pytest.mark.parametrize(
    ("metadata", "param", "code"),
    [
        ({str(index): "" for index in range(16)}, None, None),
        ({str(index): "" for index in range(17)}, "metadata", "object_above_max_properties"),
        ({"k" * 64: ""}, None, None),
        ({"k" * 65: ""}, f"metadata.{'k' * 65}", "string_above_max_length"),
        ({"k": "v" * 512}, None, None),
        ({"k": "v" * 513}, "metadata.k", "string_above_max_length"),
        ({"k": 1}, "metadata.k", "invalid_type"),
        ({"k": None}, "metadata.k", "invalid_type"),
        (["k"], "metadata", "invalid_type"),
    ],
)
def test_059_the_limits_of_metadata(
    http: httpx2.Client, metadata: object, param: str | None, code: str | None
) -> None:
    file = http.post("/v1/files", files={"file": b"{}"}, data={"purpose": "batch"}).json()
    answer = http.post("/v1/batches", json=wish(file["id"], metadata=metadata))
    if code is None:
        assert answer.json()["metadata"] == metadata
        return
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


def test_060_metadata_comes_back_unchanged(client: OpenAI, file_id: str) -> None:
    metadata = {f"{index:064}": "é😀" * 256 for index in range(16)}
    batch = create(client, file_id, metadata=metadata)
    assert client.batches.retrieve(batch.id).metadata == metadata
    assert client.batches.list().data[0].metadata == metadata
    assert create(client, file_id, extra_body={"metadata": None}).metadata is None


def test_061_result_files_expire_as_asked_from_their_own_creation(service: Service) -> None:
    policy = {"anchor": "created_at", "seconds": 7_200}
    lines = [completion_line(0), completion_line(1, n=0)]
    batch = service.run(lines, output_expires_after=policy)
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert file_id is not None
        file = service.client.files.retrieve(file_id)
        assert file.expires_at == file.created_at + 7_200
        assert file.created_at >= (batch.finalizing_at or 0)


def test_062_an_unknown_input_file_is_400(client: OpenAI, http: httpx2.Client) -> None:
    for file_id in ("file-none", "../../etc/passwd", "x" * 70):
        answer = http.post("/v1/batches", json=wish(file_id))
        error = error_of(answer)
        assert (answer.status_code, error["param"]) == (400, "file_id")
        assert error["message"] == f"Cannot find file {file_id}."
    answer = http.post("/v1/batches", content=json.dumps(wish("\ud800")))
    assert (answer.status_code, error_of(answer)["param"]) == (400, "input_file_id")
    tuning = client.files.create(file=b"{}", purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="expected 'batch'") as refusal:
        create(client, tuning.id)
    assert refusal.value.param == "input_file_id"


def test_063_two_batches_of_one_file_have_files_of_their_own(service: Service) -> None:
    first = service.submit([completion_line(0)])
    second = create(service.client, first.input_file_id)
    ends = [service.wait(batch.id) for batch in (first, second)]
    assert len({batch.output_file_id for batch in ends}) == 2
    assert all(len(service.rows(batch.output_file_id)) == 1 for batch in ends)


def test_064_one_key_makes_one_batch(client: OpenAI, file_id: str) -> None:
    key = {"Idempotency-Key": "nightly-1"}
    first = create(client, file_id, extra_headers=key, metadata={"a": "1", "b": "2"})
    again = create(client, file_id, extra_headers=key, metadata={"b": "2", "a": "1"})
    assert again == first
    with pytest.raises(openai.ConflictError, match="idempotency key 'nightly-1'") as refusal:
        create(client, file_id, extra_headers=key, metadata={"a": "2"})
    assert refusal.value.code == "idempotency_key_reused"
    assert refusal.value.request.headers["x-stainless-retry-count"] == "0"
    assert create(client, file_id).id != create(client, file_id).id


def test_064_a_key_has_a_length(http: httpx2.Client, file_id: str) -> None:
    for key, status in (("k" * 255, 200), ("k" * 256, 400), ("", 400)):
        answer = http.post("/v1/batches", json=wish(file_id), headers={"idempotency-key": key})
        assert answer.status_code == status


class LosesAnswers:
    """Carries out the first `POST /v1/batches`, and loses what was answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.num_lost = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loses = scope.get("path") == "/v1/batches" and not self.num_lost

        async def swallow(message: Message) -> None:
            self.num_lost += message["type"] == "http.response.start"

        await self._app(scope, receive, swallow if loses else send)


@pytest.fixture
def lossy(tmp_path: Path) -> Iterator[str]:
    with serving(LosesAnswers(create_app(Settings(state_dir=tmp_path)))) as url:
        yield url


def test_065_a_retry_after_a_lost_answer_makes_one_batch(lossy: str, lines: bytes) -> None:
    with OpenAI(base_url=f"{lossy}/v1", api_key="any") as client:
        file = client.files.create(file=lines, purpose="batch")
        batch = create(client, file.id, extra_headers={"Idempotency-Key": "k"})
        assert [found.id for found in client.batches.list()] == [batch.id]
