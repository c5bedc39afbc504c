"""Checklist 101 to 112: cancelling and expiry."""

import json
import time

import httpx2
import openai
import pytest
from rq import Queue

from jobs.batch import BatchStatus
from jobs.queue import INTAKE_QUEUE
from tests.support.box import Box, completion_line
from tests.support.server import Running
from tests.support.service import Service
from worker.context import IntakeContext
from worker.finalize import finalize_batch
from worker.intake import validate_batch
from worker.reconcile import reconcile

S = BatchStatus


@pytest.fixture(scope="module")
def cancelled(service: Service) -> openai.types.Batch:
    """Three of twelve lines had finished when it was asked for."""
    lines = [completion_line(index, max_tokens=1 if index < 3 else 200) for index in range(12)]
    batch = service.submit(lines)
    service.box.until(lambda: service.box.num_settled(batch.id) == 3)
    asked = service.client.batches.cancel(batch.id)
    assert asked.status == "cancelling"
    assert asked.cancelling_at is not None
    assert asked.cancelled_at is None
    again = service.client.batches.cancel(batch.id)
    assert again.status in ("cancelling", "cancelled")
    return service.wait(batch.id)


def test_101_a_running_batch_is_cancelled(cancelled: openai.types.Batch) -> None:
    assert cancelled.status == "cancelled"
    assert cancelled.cancelling_at is not None
    assert cancelled.cancelled_at is not None
    assert cancelled.cancelling_at <= cancelled.cancelled_at
    assert (cancelled.completed_at, cancelled.expired_at) == (None, None)


def test_102_finished_lines_are_kept_and_the_rest_is_told(
    service: Service, cancelled: openai.types.Batch
) -> None:
    output, errors = (
        service.rows(file_id) for file_id in (cancelled.output_file_id, cancelled.error_file_id)
    )
    assert [row["custom_id"] for row in output] == ["c-0", "c-1", "c-2"]
    assert [row["custom_id"] for row in errors] == [f"c-{index}" for index in range(3, 12)]
    for row in errors:
        assert row["response"] is None
        assert row["error"]["code"] == "batch_cancelled"


def test_103_cancelled_lines_are_not_failed_ones(cancelled: openai.types.Batch) -> None:
    assert cancelled.request_counts is not None
    assert cancelled.request_counts.model_dump() == {"total": 12, "completed": 3, "failed": 0}


def test_104_cancelling_while_validating_runs_nothing(box: Box, context: IntakeContext) -> None:
    batch_id = box.add([completion_line(index) for index in range(5)])
    box.cancel(batch_id)
    validate_batch(context, batch_id)
    finalize_batch(context, batch_id)
    batch = box.batch(batch_id)
    assert (batch.status, batch.output_file_id) == (S.CANCELLED, None)
    assert len(box.rows(batch.error_file_id)) == 5
    assert len(box.queue) == 0


def test_105_cancelling_twice_is_one_cancel(
    service: Service, cancelled: openai.types.Batch
) -> None:
    assert service.client.batches.cancel(cancelled.id) == cancelled


@pytest.mark.parametrize("status", [S.COMPLETED, S.FAILED, S.EXPIRED, S.FINALIZING])
def test_106_what_has_ended_is_not_cancelled(
    client: openai.OpenAI, running: Running, file_id: str, status: BatchStatus
) -> None:
    batch = client.batches.create(
        input_file_id=file_id, endpoint="/v1/completions", completion_window="24h"
    )
    paths = {
        S.COMPLETED: [S.IN_PROGRESS, S.FINALIZING, S.COMPLETED],
        S.FINALIZING: [S.IN_PROGRESS, S.FINALIZING],
    }
    for step in paths.get(status, [status]):
        assert running.ledger.batches.advance(batch.id, step)
    words = f"Cannot cancel a batch with status '{status}'."
    with pytest.raises(openai.ConflictError, match=words) as refusal:
        client.batches.cancel(batch.id)
    assert (refusal.value.param, refusal.value.code) == (None, None)
    assert refusal.value.type == "invalid_request_error"
    assert refusal.value.request.headers["x-stainless-retry-count"] == "0"


def test_107_cancelling_the_unknown_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="No batch found with id 'batch_none'"):
        client.batches.cancel("batch_none")


def test_108_an_empty_json_body_cancels(http: httpx2.Client, file_id: str) -> None:
    wish = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = http.post("/v1/batches", json=wish).json()
    headers = {"content-type": "application/json", "content-length": "0"}
    answer = http.post(f"/v1/batches/{batch['id']}/cancel", headers=headers)
    assert answer.json()["status"] == "cancelling"


def test_109_a_hanging_engine_holds_no_cancel_up(box: Box, context: IntakeContext) -> None:
    # No worker at all: what ends the batch asks nobody.
    batch_id = box.add([completion_line(index) for index in range(9)])
    validate_batch(context, batch_id)
    assert len(box.queue) == 3
    box.cancel(batch_id)
    finalize_batch(context, batch_id)
    assert box.batch(batch_id).status is S.CANCELLED


@pytest.fixture
def expired_id(box: Box, context: IntakeContext) -> str:
    """One of three lines finished before the window ended; no worker is alive."""
    lines = [completion_line(0, max_tokens=-1), completion_line(1), completion_line(2)]
    batch_id = box.add(lines, window_s=1.5)
    validate_batch(context, batch_id)
    time.sleep(max(0.0, box.batch(batch_id).expires_at - time.time()))
    finalize_batch(context, batch_id)
    return batch_id


def test_110_what_is_finished_is_kept_and_the_rest_expires(box: Box, expired_id: str) -> None:
    batch = box.batch(expired_id)
    assert batch.status is S.EXPIRED
    assert batch.expired_at is not None
    assert batch.expired_at >= batch.expires_at
    rows = box.rows(batch.error_file_id)
    assert [row["custom_id"] for row in rows] == ["c-0", "c-1", "c-2"]
    assert [row["error"] for row in rows][1:] == 2 * [
        {
            "code": "batch_expired",
            "message": "This request could not be executed before the completion window expired.",
        }
    ]
    assert json.dumps(rows[1]["response"]) == "null"


def test_111_expired_lines_are_not_failed_ones(box: Box, expired_id: str) -> None:
    counts = box.batch(expired_id).request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 0, 1)


def test_112_a_window_ends_though_no_worker_is_alive(box: Box, context: IntakeContext) -> None:
    batch_id = box.add([completion_line(0)], window_s=1.5)
    validate_batch(context, batch_id)
    box.redis.flushall()
    time.sleep(max(0.0, box.batch(batch_id).expires_at - time.time()))
    reconcile(box.ledger, box.doorbell, box.store, shards_ahead=1)
    assert Queue(INTAKE_QUEUE, connection=box.redis).job_ids == [f"finalize-{batch_id}"]
    finalize_batch(context, batch_id)
    assert box.batch(batch_id).status is S.EXPIRED
