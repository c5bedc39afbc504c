"""Checklist 66, and what a batch can do beyond the contract: each with the official client, strict."""

import json
import threading
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from jobs.batch import BatchStatus
from tests.support.box import completion_line
from tests.support.server import Running
from tests.support.service import COMPLETIONS, Service
from tests.support.wire import error_of

S = BatchStatus


def ours(batch: Batch, name: str) -> Any:
    """A field that the client does not know."""
    assert batch.model_extra is not None
    return batch.model_extra[name]


def create(client: OpenAI, file_id: str, **more: Any) -> Batch:
    return client.batches.create(
        input_file_id=file_id,
        endpoint=COMPLETIONS,  # type: ignore[arg-type]  # the client lists endpoints as literals
        completion_window="24h",
        extra_body=more,
    )


def retry(client: OpenAI, batch_id: str, key: str | None = None) -> Batch:
    headers = {} if key is None else {"Idempotency-Key": key}
    return client.post(f"/batches/{batch_id}/retry", cast_to=Batch, options={"headers": headers})


def test_066_a_priority_is_accepted_and_echoed(client: OpenAI, file_id: str) -> None:
    batch = create(client, file_id, priority=5)
    assert ours(batch, "priority") == 5
    assert ours(client.batches.retrieve(batch.id), "priority") == 5
    assert ours(client.batches.list(limit=1).data[0], "priority") == 5
    for plain in ({}, {"priority": None}, {"priority": 0}):
        assert ours(create(client, file_id, **plain), "priority") == 0


def test_066_an_earlier_deadline_is_seen_in_expires_at(client: OpenAI, file_id: str) -> None:
    policy = {"anchor": "created_at", "seconds": 7_200}
    batch = create(client, file_id, expires_after=policy)
    assert batch.expires_at == batch.created_at + 7_200
    assert batch.completion_window == "24h"
    plain = create(client, file_id, expires_after=None)
    assert plain.expires_at == plain.created_at + 86_400


def lifetime(seconds: object, anchor: object = "created_at") -> dict[str, Any]:
    return {"expires_after": {"anchor": anchor, "seconds": seconds}}


@pytest.mark.parametrize(
    ("wish", "refused"),
    [
        ({"priority": "high"}, ("priority", "invalid_type")),
        ({"priority": 1.5}, ("priority", "invalid_type")),
        ({"priority": True}, ("priority", "invalid_type")),
        ({"priority": 101}, ("priority", "integer_above_max_value")),
        ({"priority": -101}, ("priority", "integer_below_min_value")),
        ({"expires_after": 60}, ("expires_after", "invalid_type")),
        (lifetime(60, None), ("expires_after.anchor", "missing_required_parameter")),
        (lifetime(60, "now"), ("expires_after.anchor", "invalid_value")),
        (lifetime(59), ("expires_after.seconds", "integer_below_min_value")),
        (lifetime(86_401), ("expires_after.seconds", "integer_above_max_value")),
        ({"prioritty": 5}, ("prioritty", "unknown_parameter")),
    ],
)
def test_066_a_wrong_wish_is_refused_by_name(
    client: OpenAI, file_id: str, wish: dict[str, Any], refused: tuple[str, str]
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        create(client, file_id, **wish)
    assert (refusal.value.param, refusal.value.code) == refused


def test_options_are_part_of_what_a_key_stands_for(client: OpenAI, file_id: str) -> None:
    def asked(**more: Any) -> Batch:
        return client.batches.create(
            input_file_id=file_id,
            endpoint=COMPLETIONS,  # type: ignore[arg-type]
            completion_window="24h",
            extra_headers={"Idempotency-Key": "options"},
            extra_body=more,
        )

    assert asked(priority=5) == asked(priority=5)
    with pytest.raises(openai.ConflictError):
        asked(priority=6)


def test_progress_is_told_of_a_live_batch_alone(service: Service) -> None:
    lines = [completion_line(index, max_tokens=4 if index < 3 else 200) for index in range(12)]
    batch = service.submit(lines)
    fresh = ours(batch, "progress")
    assert (fresh["lines_total"], fresh["lines_done"], fresh["output_tokens"]) == (0, 0, 0)
    seen: list[dict[str, Any]] = []

    def is_expected() -> bool:
        told = ours(service.client.batches.retrieve(batch.id), "progress")
        seen.append(told or {})
        return told is None or (told["lines_done"] == 3 and told["seconds_left"] is not None)

    service.box.until(is_expected)
    told = seen[-1]
    assert (told["lines_total"], told["lines_done"], told["output_tokens"]) == (12, 3, 12)
    assert told["tokens_per_s"] > 0
    assert told["position"] >= 1
    assert told["noted_at"] >= batch.created_at
    assert ours(service.wait(batch.id), "progress") is None


def test_results_are_read_while_the_rest_runs(service: Service) -> None:
    limits = [1, 1, 200, 1]
    batch = service.submit(
        [completion_line(index, max_tokens=limit) for index, limit in enumerate(limits)]
    )
    service.box.until(lambda: service.box.num_settled(batch.id) == 3)
    assert [row["custom_id"] for row in early(service, batch.id)] == ["c-0", "c-1"]
    assert [row["custom_id"] for row in early(service, batch.id, after=1)] == ["c-1"]
    assert early(service, batch.id, after=2) == []
    ended = service.wait(batch.id)
    assert early(service, batch.id) == service.rows(ended.output_file_id)
    assert early(service, batch.id, after=3) == service.rows(ended.output_file_id)[3:]
    assert early(service, batch.id, after=4) == []


def early(service: Service, batch_id: str, after: int = 0) -> list[dict[str, Any]]:
    answer = httpx2.get(f"{service.url}/v1/batches/{batch_id}/results", params={"after": after})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/jsonl")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_results_of_lines_that_failed_are_in_their_places(service: Service) -> None:
    lines = [completion_line(0), completion_line(1, n=0), completion_line(2)]
    batch = service.run(lines)
    rows = early(service, batch.id)
    assert [row["custom_id"] for row in rows] == ["c-0", "c-1", "c-2"]
    assert [row["response"]["status_code"] for row in rows] == [200, 400, 200]


def test_results_are_asked_for_in_the_contracts_words(http: httpx2.Client, file_id: str) -> None:
    answer = http.get("/v1/batches/batch_none/results")
    assert answer.status_code == 404
    assert error_of(answer)["message"] == "No batch found with id 'batch_none'."
    wish = {"input_file_id": file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    batch_id = http.post("/v1/batches", json=wish).json()["id"]
    assert http.get(f"/v1/batches/{batch_id}/results").text == ""
    for after, code in (("-1", "integer_below_min_value"), ("x", "invalid_type")):
        error = error_of(http.get(f"/v1/batches/{batch_id}/results", params={"after": after}))
        assert (error["param"], error["code"]) == ("after", code)


@pytest.fixture(scope="module")
def partly(service: Service) -> Batch:
    """Of five lines, two are refused."""
    lines = [completion_line(index, **({"n": 0} if index % 2 else {})) for index in range(5)]
    return service.run(lines, metadata={"job": "nightly"}, extra_body={"priority": 3})


def test_a_retry_has_the_lines_that_failed_and_all_else_as_before(
    service: Service, partly: Batch
) -> None:
    again = retry(service.client, partly.id)
    assert (ours(again, "retry_of"), ours(again, "priority")) == (partly.id, 3)
    assert (again.endpoint, again.metadata) == (partly.endpoint, partly.metadata)
    assert again.input_file_id != partly.input_file_id
    ended = service.wait(again.id)
    assert ended.request_counts is not None
    assert ended.request_counts.model_dump() == {"total": 2, "completed": 0, "failed": 2}
    lines = service.client.files.content(again.input_file_id).text.splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == ["c-1", "c-3"]
    file = service.client.files.retrieve(again.input_file_id)
    assert (file.purpose, file.filename) == ("batch", f"{partly.id}_retry.jsonl")


def test_a_retry_of_a_cancelled_batch_has_what_never_ran(service: Service) -> None:
    lines = [completion_line(index, max_tokens=1 if index < 2 else 200) for index in range(5)]
    batch = service.submit(lines)
    service.box.until(lambda: service.box.num_settled(batch.id) == 2)
    service.client.batches.cancel(batch.id)
    assert service.wait(batch.id).status == "cancelled"
    again = retry(service.client, batch.id)
    raw = service.client.files.content(again.input_file_id).text
    assert raw.splitlines() == lines[2:]
    service.client.batches.cancel(again.id)


def test_a_key_makes_one_retry(service: Service, partly: Batch) -> None:
    found: list[Batch] = []

    def ask() -> None:
        found.append(retry(service.client, partly.id, key="again"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({batch.id for batch in found}) == 1
    page = service.client.files.list(purpose="batch", limit=100)
    names = [file.id for file in page if file.filename == f"{partly.id}_retry.jsonl"]
    assert found[0].input_file_id in names
    assert ours(found[0], "retry_of") == partly.id
    with pytest.raises(openai.ConflictError, match="used with other parameters"):
        retry(service.client, found[0].id, key="again")


def test_a_race_for_a_key_leaves_no_file(service: Service, partly: Batch) -> None:
    def files() -> set[str]:
        return {file.id for file in service.client.files.list(purpose="batch", limit=10_000)}

    before = files()
    threads = [
        threading.Thread(target=retry, args=(service.client, partly.id, "race")) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files() - before) == 1


def test_what_succeeded_is_not_retried(service: Service) -> None:
    batch = service.run([completion_line(0)])
    with pytest.raises(openai.ConflictError, match="no line left to retry"):
        retry(service.client, batch.id)


def test_a_retry_needs_its_input_file(service: Service) -> None:
    batch = service.run([completion_line(0, n=0)])
    service.client.files.delete(batch.input_file_id)
    with pytest.raises(openai.BadRequestError, match="Cannot find file") as refusal:
        retry(service.client, batch.id)
    assert refusal.value.param == "file_id"


@pytest.mark.parametrize(
    "status", [S.VALIDATING, S.FAILED, S.CANCELLING, S.IN_PROGRESS, S.FINALIZING]
)
def test_what_has_not_ended_or_was_found_wrong_is_not_retried(
    client: OpenAI, running: Running, file_id: str, status: BatchStatus
) -> None:
    batch = create(client, file_id)
    paths = {
        S.VALIDATING: [],
        S.FINALIZING: [S.IN_PROGRESS, S.FINALIZING],
    }
    for step in paths.get(status, [status]):
        assert running.ledger.batches.advance(batch.id, step)
    with pytest.raises(openai.ConflictError, match=f"with status '{status}'"):
        retry(client, batch.id)
    with pytest.raises(openai.NotFoundError):
        retry(client, "batch_none")


@pytest.fixture
def unseen(client: OpenAI, running: Running, file_id: str) -> Batch:
    """Cancelled before a line of it was looked at."""
    batch = create(client, file_id)
    for step in (S.CANCELLING, S.CANCELLED):
        assert running.ledger.batches.advance(batch.id, step)
    return client.batches.retrieve(batch.id)


def test_a_retry_of_what_was_never_looked_at_is_all_of_it(
    client: OpenAI, unseen: Batch, lines: bytes
) -> None:
    again = retry(client, unseen.id)
    assert client.files.content(again.input_file_id).content == lines
    assert again.input_file_id != unseen.input_file_id
