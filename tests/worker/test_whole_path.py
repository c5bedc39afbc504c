"""Batches through real intake and worker processes."""

from jobs.batch import BatchStatus, Endpoint
from jobs.tenant import Caller, Limits
from tests.support.box import Box, chat_line, completion_line


def test_a_batch_goes_from_validating_to_completed(box: Box) -> None:
    lines = [completion_line(index) for index in range(10)]
    lines.insert(4, completion_line(99, suffix="x"))
    with box.running("intake"), box.running("worker"):
        batch = box.wait(box.add(lines))
    assert batch.status is BatchStatus.COMPLETED
    assert batch.request_counts.total == 11
    assert (batch.request_counts.completed, batch.request_counts.failed) == (10, 1)
    output = box.rows(batch.output_file_id)
    assert [row["custom_id"] for row in output] == [f"c-{index}" for index in range(10)]
    body = output[0]["response"]["body"]
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == len("prompt 0")
    assert batch.usage.output_tokens == 20
    (error,) = box.rows(batch.error_file_id)
    assert error["response"]["body"]["error"]["code"] == "unsupported_parameter"
    assert not box.store.delete(batch.input_blob)


def test_chat_answers_have_the_contracts_shape(box: Box) -> None:
    with box.running("intake"), box.running("worker"):
        batch = box.wait(box.add([chat_line(0, max_tokens=3)], endpoint=Endpoint.CHAT_COMPLETIONS))
    (row,) = box.rows(batch.output_file_id)
    body = row["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["refusal"] is None
    assert len(body["choices"][0]["message"]["content"]) == 3


def test_two_batches_share_one_block_and_the_report_says_so(box: Box) -> None:
    first = box.add([completion_line(index, max_tokens=20) for index in range(8)])
    second = box.add([completion_line(index, max_tokens=20) for index in range(8)])
    with box.running("intake"):
        box.until(lambda: len(box.queue) == 4)
        with box.running("worker"):
            box.wait(first)
            box.wait(second)
            box.until(box.reports)
    blocks = box.reports()[-1]["blocks"]
    assert {first: 8, second: 8} in [block["rows"] for block in blocks]


def test_a_busy_period_reports_itself_and_not_those_before(box: Box) -> None:
    with box.running("intake"), box.running("worker"):
        box.wait(box.add([completion_line(0, max_tokens=20)]))
        box.until(box.reports)
        box.wait(box.add([completion_line(0, max_tokens=5)]))
        box.until(lambda: len(box.reports()) == 2)
    first, second = box.reports()
    assert (first["num_sweeps"], second["num_sweeps"]) == (20, 5)
    assert (first["engine"]["num_sweeps"], second["engine"]["num_sweeps"]) == (20, 5)


def test_a_small_batch_ends_while_a_large_one_runs(box: Box) -> None:
    large = box.add([completion_line(index, max_tokens=1) for index in range(800)])
    with box.running("intake"), box.running("worker", block_rows=4, sweep_s=0.02):
        box.until(lambda: box.num_settled(large) > 20)
        small = box.add([completion_line(index, max_tokens=1) for index in range(12)])
        assert box.wait(small).request_counts.completed == 12
        assert box.batch(large).status is BatchStatus.IN_PROGRESS
        assert box.num_settled(large) < 400


def test_a_tenants_lines_over_its_limit_wait_and_are_answered(box: Box) -> None:
    caller = Caller(tenant="t", limits=Limits(enqueued_lines=8))
    lines = [completion_line(index, max_tokens=3) for index in range(20)]
    made = [box.add(lines, caller=caller) for _ in range(2)]
    with box.running("intake"):
        box.until(lambda: all(box.batch(batch_id).request_counts.total for batch_id in made))
        box.until(lambda: len(box.queue) == 2)  # of ten shards
        with box.running("worker"):
            ended = [box.wait(batch_id) for batch_id in made]
    assert [batch.request_counts.completed for batch in ended] == [20, 20]


def test_a_batch_fills_a_block_larger_than_its_share_of_the_queue(box: Box) -> None:
    batch_id = box.add([completion_line(index, max_tokens=200) for index in range(160)])
    with box.running("intake"):
        box.until(lambda: len(box.queue) == 16)
        with box.running("worker", block_rows=150, sweep_s=0.002):
            box.wait(batch_id)
            box.until(box.reports)
    assert any(block["rows"][batch_id] >= 150 for block in box.reports()[-1]["blocks"])


def test_started_jobs_are_the_shards_held(box: Box) -> None:
    batch_id = box.add([completion_line(index, max_tokens=200) for index in range(20)])
    with box.running("intake"), box.running("worker", block_rows=64, sweep_s=0.02):
        box.until(lambda: box.queue.started_job_registry.count == 5)
        assert len(box.queue) == 0
        box.cancel(batch_id)
        box.until(lambda: box.queue.started_job_registry.count == 0)


def test_what_is_no_shard_fails_and_harms_nobody(box: Box) -> None:
    box.queue.enqueue_call("os.getcwd", job_id="odd")
    box.queue.enqueue_call("worker.block_worker.run_shard", args=("batch_none", 3), job_id="none")
    box.redis.rpush(box.queue.key, "unknown", "bad")
    box.redis.hset("rq:job:bad", mapping={"data": b"\x00", "created_at": "x", "status": "queued"})
    with box.running("intake"), box.running("worker") as worker:
        batch = box.wait(box.add([completion_line(0)]))
        assert batch.request_counts.completed == 1
        box.until(lambda: set(box.queue.failed_job_registry.get_job_ids()) == {"odd", "none"})
        assert worker.poll() is None


def test_an_engine_that_had_better_be_loaded_anew_is_and_no_line_is_lost(box: Box) -> None:
    with box.running("intake"), box.running("worker", num_reloads=2):
        batch = box.wait(box.add([completion_line(index) for index in range(30)]), seconds=40)
        box.until(box.reports)
    assert batch.request_counts.completed == 30
    assert sorted(box.custom_ids(batch)) == sorted(f"c-{index}" for index in range(30))
    assert len(box.calls("load")) == 3
    assert len(box.submitted()) == 30
    (report,) = box.reports()
    assert report["prediction"] == {"num_sweeps": report["num_sweeps"]}
