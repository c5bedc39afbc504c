"""Checklist 84 to 100: a batch at work, as a client sees it."""

import errno
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from jobs.batch import NEXT_STATUSES, BatchStatus
from jobs.stores.folder import FolderStore
from tests.support.box import Box, completion_line
from tests.support.processes import server_process
from tests.support.service import FINAL, Service
from worker.context import IntakeContext
from worker.finalize import finalize_batch
from worker.intake import validate_batch

TIMES = ("created_at", "in_progress_at", "finalizing_at", "completed_at")


@pytest.fixture(scope="module")
def seen(service: Service) -> list[Any]:
    """What a poller saw of a batch of unequal lines, one of them refused."""
    lines = [completion_line(index, max_tokens=1 + 3 * index) for index in range(40)]
    lines[5] = completion_line(5, max_tokens=-1)
    found = [service.submit(lines)]
    while found[-1].status not in FINAL:
        found.append(service.client.batches.retrieve(found[0].id))
    return found


def test_084_statuses_go_along_the_table(seen: list[Any]) -> None:
    told = [BatchStatus(status) for status, _ in itertools.groupby(batch.status for batch in seen)]
    assert (told[0], told[-1]) == (BatchStatus.VALIDATING, BatchStatus.COMPLETED)
    assert BatchStatus.IN_PROGRESS in told
    for earlier, later in itertools.pairwise(told):
        nearest = NEXT_STATUSES[earlier]
        assert later in nearest | {last for status in nearest for last in NEXT_STATUSES[status]}


def test_085_times_are_set_once_and_in_order(seen: list[Any]) -> None:
    for name in TIMES:
        assert len({getattr(batch, name) for batch in seen} - {None}) == 1
        values = [getattr(batch, name) for batch in seen]
        assert values == sorted(values, key=lambda value: value is not None)  # never cleared
    last = [getattr(seen[-1], name) for name in TIMES]
    assert last == sorted(last)


def test_086_counts_only_grow(seen: list[Any]) -> None:
    counts = [batch.request_counts for batch in seen]
    for batch in seen:
        assert batch.request_counts.total == (0 if batch.status == "validating" else 40)
    for earlier, later in itertools.pairwise(counts):
        assert (earlier.completed, earlier.failed) <= (later.completed, later.failed)
    assert all(count.completed + count.failed <= count.total for count in counts)


def test_087_progress_is_seen_on_the_way(seen: list[Any]) -> None:
    running = [batch for batch in seen if batch.status == "in_progress"]
    assert any(0 < batch.request_counts.completed < 39 for batch in running)


def test_088_file_ids_come_last(seen: list[Any]) -> None:
    for batch in seen[:-1]:
        assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert None not in (seen[-1].output_file_id, seen[-1].error_file_id)


def test_089_files_are_whole_when_completed_is_seen(service: Service) -> None:
    for _ in range(3):
        batch = service.submit([completion_line(index) for index in range(100)])
        while (found := service.client.batches.retrieve(batch.id)).status != "completed":
            assert found.status not in FINAL
        assert len(service.rows(found.output_file_id)) == 100


def test_090_a_file_without_lines_is_null(service: Service) -> None:
    good = service.run([completion_line(0)])
    assert good.output_file_id is not None
    assert good.error_file_id is None
    bad = service.run([completion_line(index, max_tokens=-1) for index in range(3)])
    assert (bad.status, bad.output_file_id) == ("completed", None)
    assert len(service.rows(bad.error_file_id)) == 3
    assert bad.request_counts is not None
    assert bad.request_counts.model_dump() == {"total": 3, "completed": 0, "failed": 3}


def test_091_every_line_is_in_one_file_once(service: Service, seen: list[Any]) -> None:
    rows = service.rows(seen[-1].output_file_id) + service.rows(seen[-1].error_file_id)
    assert sorted(row["custom_id"] for row in rows) == sorted(f"c-{index}" for index in range(40))


def test_092_counts_are_those_of_the_files(service: Service, seen: list[Any]) -> None:
    counts = seen[-1].request_counts
    assert len(service.rows(seen[-1].output_file_id)) == counts.completed == 39
    assert len(service.rows(seen[-1].error_file_id)) == counts.failed == 1


def test_094_what_is_wrong_with_a_line_is_not_tried_again(service: Service) -> None:
    before = len(service.box.submitted())
    batch = service.run([completion_line(0, prompt="x" * 300)])
    assert len(service.box.submitted()) == before
    (row,) = service.rows(batch.error_file_id)
    assert (row["response"]["status_code"], row["error"]) == (400, None)
    error = row["response"]["body"]["error"]
    assert (error["code"], error["type"]) == ("context_length_exceeded", "invalid_request_error")


def test_096_usage_is_the_sum_over_output_lines(service: Service, seen: list[Any]) -> None:
    batch = seen[-1]
    usages = [row["response"]["body"]["usage"] for row in service.rows(batch.output_file_id)]
    assert batch.model == "tiny"
    assert batch.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert batch.usage.output_tokens == sum(usage["completion_tokens"] for usage in usages)
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens


def test_100_a_full_disk_delays_the_end_and_shortens_no_file(
    box: Box, context: IntakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = box.add([completion_line(index, max_tokens=-1) for index in range(50)])
    validate_batch(context, batch_id)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("worker.finalize._joined", fail)
        with pytest.raises(OSError, match="No space"):
            finalize_batch(context, batch_id)
    assert box.batch(batch_id).status is BatchStatus.FINALIZING
    assert not [
        name for name in FolderStore.open(box.settings.files_dir).names() if "file-" in name
    ]
    finalize_batch(context, batch_id)
    batch = box.batch(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert len(box.rows(batch.error_file_id)) == 50


@pytest.mark.slow
def test_098_everything_killed_goes_on_from_what_was_finished(tmp_path: Path, box: Box) -> None:
    lines = [completion_line(index, max_tokens=1 + index % 9) for index in range(60)]
    with (
        server_process(box.settings) as (server, url),
        box.running("intake"),
        box.running("worker", block_rows=8, sweep_s=0.02),
    ):
        service = Service(url=url, client=OpenAI(base_url=f"{url}/v1", api_key="any"), box=box)
        batch_id = service.submit(lines).id
        box.until(lambda: box.num_settled(batch_id) > 15, seconds=60)
        server.kill()
    before = box.num_settled(batch_id)
    num_submitted = len(box.submitted())
    time.sleep(box.settings.lease_s)
    with (
        server_process(box.settings) as (_, url),
        box.running("intake"),
        box.running("worker", block_rows=8),
    ):
        service = Service(url=url, client=OpenAI(base_url=f"{url}/v1", api_key="any"), box=box)
        batch = service.wait(batch_id, limit_s=120)
        rows = service.rows(batch.output_file_id)
    assert sorted(row["custom_id"] for row in rows) == sorted(f"c-{index}" for index in range(60))
    assert len(box.submitted()) - num_submitted == 60 - before
