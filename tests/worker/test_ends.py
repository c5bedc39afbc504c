"""How batches end, and what reconcile rings again."""

import dataclasses
import json
import time

import pytest
from rq import Queue

from jobs.answers import Usage
from jobs.batch import BatchStatus, ExpiryPolicy, new_batch_id
from jobs.errors import NotFoundError
from jobs.file import File, Purpose, new_file_id
from jobs.line import Outcome, completed_result
from jobs.queue import INTAKE_QUEUE
from jobs.tenant import Caller
from tests.support.box import Box, completion_line
from worker.context import IntakeContext
from worker.finalize import finalize_batch, result_file_id
from worker.intake import validate_batch
from worker.reconcile import Reconciler, delete_stale_snapshots, reconcile


def _begun(box: Box, context: IntakeContext, num_lines: int, *, window_s: float = 1_000) -> str:
    batch_id = box.add(
        [completion_line(index) for index in range(num_lines)], window_s=window_s, ring=False
    )
    validate_batch(context, batch_id)
    return batch_id


def _settle(box: Box, batch_id: str, indices: range) -> None:
    lines = [
        line
        for shard in range(10)
        for line in box.ledger.lines.unsettled(batch_id, shard)
        if line.index in indices
    ]
    box.ledger.lines.record(
        [
            completed_result(
                batch_id,
                line,
                body={"n": line.index},
                usage=Usage(input_tokens=1, output_tokens=1),
            )
            for line in lines
        ]
    )


def _reconcile(box: Box) -> None:
    reconcile(box.ledger, box.doorbell, box.store, shards_ahead=box.settings.shards_ahead)


def _intake_jobs(box: Box) -> list[str]:
    return Queue(INTAKE_QUEUE, connection=box.redis).get_job_ids()


def test_finalizing_waits_for_the_last_line(box: Box, context: IntakeContext) -> None:
    batch_id = _begun(box, context, 6)
    _settle(box, batch_id, range(5))
    finalize_batch(context, batch_id)
    assert box.batch(batch_id).status is BatchStatus.IN_PROGRESS
    _settle(box, batch_id, range(6))
    finalize_batch(context, batch_id)
    assert box.batch(batch_id).status is BatchStatus.COMPLETED


def test_a_crash_before_the_last_step_makes_no_second_file(
    box: Box, context: IntakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = _begun(box, context, 3)
    _settle(box, batch_id, range(3))
    with monkeypatch.context() as patch:
        patch.setattr(box.store, "size", _crash)
        with pytest.raises(OSError):
            finalize_batch(context, batch_id)
    assert box.batch(batch_id).status is BatchStatus.FINALIZING
    with monkeypatch.context() as patch:
        patch.setattr(box.ledger.batches, "advance", _crash)
        with pytest.raises(OSError):
            finalize_batch(context, batch_id)
    assert box.batch(batch_id).output_file_id is None
    finalize_batch(context, batch_id)
    finalize_batch(context, batch_id)
    batch = box.batch(batch_id)
    assert batch.output_file_id == result_file_id(batch_id, "output")
    files = box.ledger.files.page(limit=10, after=None).items
    assert [file.id for file in files] == [batch.output_file_id]
    assert files[0].filename == f"{batch_id}_output.jsonl"
    assert files[0].num_bytes == box.store.size(files[0].id)
    assert [row["custom_id"] for row in box.rows(files[0].id)] == ["c-0", "c-1", "c-2"]


def test_result_files_live_as_long_as_was_asked(box: Box, context: IntakeContext) -> None:
    for policy, lifetime_s in ((None, 30 * 86_400), (ExpiryPolicy(seconds=3_600), 3_600)):
        batch = dataclasses.replace(
            box.batch(box.add([completion_line(0)], ring=False)),
            id=new_batch_id(),
            output_expires_after=policy,
        )
        with box.store.write(batch.input_blob) as stream:
            stream.write(completion_line(0).encode())
        box.ledger.batches.add(batch)
        validate_batch(context, batch.id)
        _settle(box, batch.id, range(1))
        finalize_batch(context, batch.id)
        file = box.ledger.files.get(str(box.batch(batch.id).output_file_id))
        assert file.expires_at == file.created_at + lifetime_s


def test_result_files_are_the_batchs_tenants(box: Box, context: IntakeContext) -> None:
    caller = Caller(tenant="t")
    batch_id = box.add([completion_line(index) for index in range(2)], caller=caller, ring=False)
    validate_batch(context, batch_id)
    _settle(box, batch_id, range(1))
    box.ledger.batches.advance(batch_id, BatchStatus.CANCELLING)
    finalize_batch(context, batch_id)
    batch = box.ledger.seen_by(caller).batches.get(batch_id)
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert box.ledger.seen_by(caller).files.get(str(file_id)).tenant == "t"
        with pytest.raises(NotFoundError):
            box.ledger.seen_by(Caller()).files.get(str(file_id))


def _crash(*_: object, **__: object) -> None:
    raise OSError("no space left")


def test_a_batch_cancelled_before_it_ran_lists_its_readable_lines(
    box: Box, context: IntakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.finalize._SETTLED_AT_ONCE", 2)
    lines = [completion_line(index) for index in range(5)]
    batch_id = box.add([lines[0], "{oops", *lines[1:], lines[1]])
    box.ledger.batches.advance(batch_id, BatchStatus.CANCELLING)
    validate_batch(context, batch_id)
    with monkeypatch.context() as patch:
        patch.setattr(box.store, "size", _crash)
        with pytest.raises(OSError):
            finalize_batch(context, batch_id)
    finalize_batch(context, batch_id)
    batch = box.batch(batch_id)
    assert batch.status is BatchStatus.CANCELLED
    assert batch.output_file_id is None
    rows = box.rows(batch.error_file_id)
    assert [row["custom_id"] for row in rows] == [f"c-{index}" for index in range(5)]
    assert {row["error"]["code"] for row in rows} == {"batch_cancelled"}
    assert {row["response"] for row in rows} == {None}
    assert (batch.request_counts.completed, batch.request_counts.failed) == (0, 0)
    assert not box.store.delete(batch.input_blob)


@pytest.mark.parametrize("content", [b"", b"{oops", None])
def test_a_cancelled_batch_without_a_readable_line_has_no_files(
    content: bytes | None, box: Box, context: IntakeContext
) -> None:
    batch_id = box.add(content or b"")
    if content is None:
        box.store.delete(f"input-{batch_id}")
    box.ledger.batches.advance(batch_id, BatchStatus.CANCELLING)
    finalize_batch(context, batch_id)
    batch = box.batch(batch_id)
    assert batch.status is BatchStatus.CANCELLED
    assert (batch.output_file_id, batch.error_file_id) == (None, None)


def test_a_batch_may_expire_while_validating(box: Box, context: IntakeContext) -> None:
    batch_id = box.add([completion_line(0)], window_s=-1)
    validate_batch(context, batch_id)
    assert f"finalize-{batch_id}" in _intake_jobs(box)
    finalize_batch(context, batch_id)
    assert box.batch(batch_id).status is BatchStatus.EXPIRED


def test_expiry_is_kept_though_a_crash_came_after_settling(
    box: Box, context: IntakeContext
) -> None:
    batch_id = _begun(box, context, 3, window_s=2)
    _settle(box, batch_id, range(1))
    box.ledger.lines.settle_rest(batch_id, Outcome.EXPIRED)
    time.sleep(2)
    finalize_batch(context, batch_id)
    batch = box.batch(batch_id)
    assert batch.status is BatchStatus.EXPIRED
    assert batch.request_counts.completed == 1


def test_a_finished_batch_past_its_window_completes(box: Box, context: IntakeContext) -> None:
    batch_id = _begun(box, context, 2, window_s=2)
    _settle(box, batch_id, range(2))
    time.sleep(2)
    finalize_batch(context, batch_id)
    assert box.batch(batch_id).status is BatchStatus.COMPLETED


def test_reconcile_rings_all_that_is_due(box: Box, context: IntakeContext) -> None:
    validating = box.add([completion_line(0)], ring=False)
    running = _begun(box, context, 8)
    settled = _begun(box, context, 2)
    _settle(box, settled, range(2))
    cancelling = box.add([completion_line(0)], ring=False)
    box.ledger.batches.advance(cancelling, BatchStatus.CANCELLING)
    expired = box.add([completion_line(0)], ring=False, window_s=-1)
    box.redis.flushall()
    for _ in range(2):  # the second time nothing is rung twice
        _reconcile(box)
        assert sorted(_intake_jobs(box)) == sorted(
            [f"validate-{validating}"]
            + [f"finalize-{batch_id}" for batch_id in (settled, cancelling, expired)]
        )
        assert box.queue.get_job_ids() == [f"shard-{running}-{index}" for index in range(2)]


def test_reconcile_leaves_batches_of_another_model_alone(box: Box, context: IntakeContext) -> None:
    batch_id = _begun(box, context, 2)
    box.redis.flushall()
    (model,) = box.ledger.models.all()
    box.ledger.models.serve(type(model)(id="new", created_at=1, max_context_tokens=9))
    _reconcile(box)
    assert len(box.queue) == 0
    assert box.batch(batch_id).status is BatchStatus.IN_PROGRESS


def test_reconcile_goes_on_whatever_it_meets(
    box: Box, context: IntakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def raise_at_first(*_: object, **__: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("nobody thought of this")

    monkeypatch.setattr("worker.reconcile.reconcile", raise_at_first)
    reconciler = Reconciler(box.ledger, box.doorbell, box.store, shards_ahead=1, every_s=0.01)
    reconciler.start()
    box.until(lambda: len(calls) > 1)
    reconciler.stop()


def test_expired_files_and_stale_snapshots_lose_their_bytes(
    box: Box, context: IntakeContext
) -> None:
    file_id = new_file_id()
    with box.store.write(file_id) as stream:
        stream.write(b"x")
    now = int(time.time())
    box.ledger.files.add(
        File(
            id=file_id,
            purpose=Purpose.BATCH,
            filename="x",
            num_bytes=1,
            created_at=now,
            expires_at=now,
        )
    )
    ended = box.add([completion_line(0)], ring=False)
    box.ledger.batches.advance(ended, BatchStatus.FAILED)
    alive = box.add([completion_line(0)], ring=False)
    _reconcile(box)
    delete_stale_snapshots(box.ledger, box.store)
    assert list(box.store.names()) == [f"input-{alive}"]
    assert json.dumps(box.ledger.files.expired()) == "[]"
