"""What happens when processes die, Redis forgets, or rows break the engine."""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rq.command import send_stop_execution_command
from rq.job import Job

from jobs.batch import BatchStatus
from jobs.queue import shard_job_id
from tests.support.box import Box, completion_line
from tests.support.fake_engine import LETHAL, MORTAL, POISON
from worker.render import parse_row_key


def _conserved(box: Box, batch_id: str, num_lines: int) -> None:
    batch = box.batch(batch_id)
    expected = [f"c-{index}" for index in range(num_lines)]
    assert sorted(box.custom_ids(batch)) == sorted(expected)


def _unsettled_lines(box: Box, batch_id: str) -> set[int]:
    shards = range(15)
    return {line.index for shard in shards for line in box.ledger.lines.unsettled(batch_id, shard)}


def test_097_a_killed_worker_loses_nothing_and_repeats_no_finished_line(box: Box) -> None:
    lines = [completion_line(index, max_tokens=1 + index % 9) for index in range(60)]
    batch_id = box.add(lines)
    with box.running("intake"):
        with box.running("worker", block_rows=8, sweep_s=0.02) as worker:
            box.until(lambda: box.num_settled(batch_id) > 15)
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        before = len(box.submitted())
        unsettled = _unsettled_lines(box, batch_id)
        with box.running("worker", block_rows=8):
            batch = box.wait(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    _conserved(box, batch_id, 60)
    again = {parse_row_key(key)[1] for key in box.submitted()[before:]}
    assert again == unsettled
    assert collections.Counter(box.submitted()[before:]).most_common(1)[0][1] == 1


def test_a_killed_intake_loses_nothing(box: Box) -> None:
    with box.running("worker"):
        with box.running("intake") as intake:
            box.until(lambda: box.queue.connection.exists("rq:workers"))
            batch_id = box.add([completion_line(index) for index in range(40)])
            intake.send_signal(signal.SIGKILL)
            intake.wait()
        with box.running("intake"):
            assert box.wait(batch_id).status is BatchStatus.COMPLETED
    _conserved(box, batch_id, 40)


def test_a_stopped_worker_gives_its_shards_back_in_order(box: Box) -> None:
    batch_id = box.add([completion_line(index, max_tokens=200) for index in range(40)])
    with box.running("intake"):
        box.until(lambda: len(box.queue) == 10)
        order = box.queue.get_job_ids()
        with box.running("worker", block_rows=8, sweep_s=0.1) as worker:
            box.until(lambda: box.queue.started_job_registry.count == 4)
            box.until(lambda: len(box.submitted()) >= 16)
            worker.send_signal(signal.SIGTERM)
            before = len(box.calls("sweep"))
            assert worker.wait(10) == 0
        # The one that was under way, and one that began before the signal came; of 200.
        assert len(box.calls("sweep")) <= before + 2
        assert box.queue.get_job_ids() == order
        assert box.queue.started_job_registry.count == 0
        box.cancel(batch_id)


def test_099_a_flushed_redis_is_rung_again(box: Box) -> None:
    batch_id = box.add([completion_line(index, max_tokens=20) for index in range(80)])
    with box.running("intake"), box.running("worker", block_rows=8, sweep_s=0.005):
        box.until(lambda: box.num_settled(batch_id) >= 8)
        box.redis.flushall()
        batch = box.wait(batch_id)
        assert batch.status is BatchStatus.COMPLETED
        later = box.add([completion_line(0)])
        box.redis.flushall()
        assert box.wait(later).status is BatchStatus.COMPLETED
    _conserved(box, batch_id, 80)
    assert max(collections.Counter(box.submitted()).values()) == 1


def test_a_cancelled_batch_leaves_the_block_within_a_sweep(box: Box) -> None:
    lines = [completion_line(index, max_tokens=1 if index < 3 else 200) for index in range(12)]
    batch_id = box.add(lines)
    with box.running("intake"), box.running("worker", sweep_s=0.1):
        box.until(lambda: box.num_settled(batch_id) == 3)
        box.cancel(batch_id)
        before = len(box.calls("sweep"))
        box.until(lambda: box.queue.started_job_registry.count == 0)
        # The one that was under way, and one that began before the ledger was looked at; of 200.
        assert len(box.calls("sweep")) <= before + 2
        batch = box.wait(batch_id)
    assert batch.status is BatchStatus.CANCELLED
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 0)
    assert len(box.rows(batch.output_file_id)) == 3
    codes = {row["error"]["code"] for row in box.rows(batch.error_file_id)}
    assert codes == {"batch_cancelled"}
    _conserved(box, batch_id, 12)


def test_a_batch_past_its_window_expires_with_what_is_finished(box: Box) -> None:
    lines = [completion_line(index, max_tokens=1 if index < 2 else 200) for index in range(6)]
    with box.running("intake"), box.running("worker", sweep_s=0.05):
        box.until(lambda: box.redis.scard("rq:workers") == 2)  # the window is for work alone
        batch = box.wait(box.add(lines, window_s=4))
        box.until(lambda: box.queue.started_job_registry.count == 0)
    assert batch.status is BatchStatus.EXPIRED
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 0)
    codes = [row["error"]["code"] for row in box.rows(batch.error_file_id)]
    assert codes == ["batch_expired"] * 4
    _conserved(box, batch.id, 6)


def test_a_poisonous_line_gets_a_500_and_its_neighbours_finish(box: Box) -> None:
    lines = [completion_line(index, max_tokens=5) for index in range(15)]
    lines[6] = completion_line(6, max_tokens=5, prompt=[1, POISON])
    with box.running("intake"), box.running("worker", block_rows=16) as worker:
        batch = box.wait(box.add(lines))
        assert worker.poll() is None
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.request_counts.completed, batch.request_counts.failed) == (14, 1)
    (row,) = box.rows(batch.error_file_id)
    assert row["custom_id"] == "c-6"
    assert row["response"]["status_code"] == 500
    assert row["response"]["body"]["error"]["type"] == "server_error"


def test_093_a_broken_engine_ends_the_process_and_blames_no_line(box: Box) -> None:
    batch_id = box.add([completion_line(index) for index in range(8)])
    with box.running("intake"):
        box.until(lambda: len(box.queue) == 2)
        with box.running("worker", raises_always=True) as worker:
            assert worker.wait(20) == 1
        assert box.num_settled(batch_id) == 0
        assert len(box.queue) == 2
        with box.running("worker"):
            assert box.wait(batch_id).request_counts.completed == 8


def test_a_poisonous_line_all_alone_is_blamed_by_the_second_process(box: Box) -> None:
    batch_id = box.add([completion_line(0, prompt=[POISON])])
    with box.running("intake"):
        with box.running("worker") as worker:
            assert worker.wait(20) == 1
        assert box.num_settled(batch_id) == 0
        with box.running("worker"):
            assert box.wait(batch_id).request_counts.failed == 1


def _outlives(box: Box, *batch_ids: str) -> bool:
    """Whether a worker started now is alive when the batches have ended."""

    def ended() -> bool:
        return all(box.batch(batch_id).status.is_final for batch_id in batch_ids)

    with box.running("worker") as worker:
        box.until(lambda: worker.poll() is not None or ended())
        return worker.poll() is None


def _killed_at_work(box: Box) -> None:
    before = len(box.submitted())
    with box.running("worker", sweep_s=0.1):
        box.until(lambda: len(box.submitted()) > before)
        time.sleep(0.1)


def test_an_engine_that_is_dead_counts_as_a_process_that_died_over_its_shards(box: Box) -> None:
    batch_id = box.add([completion_line(0, prompt=[1, MORTAL])])
    with box.running("intake"), box.running("worker") as worker:
        assert worker.wait(60) == 1
        assert len(box.queue) == 1
        (found,) = box.redis.mget(f"freight:deaths:{shard_job_id(batch_id, 0)}")
        assert json.loads(found or "{}").get("num_deaths") == 1


def test_a_line_that_kills_the_process_gets_a_500_and_harms_no_other(box: Box) -> None:
    box.settings = dataclasses.replace(box.settings, lease_s=1)
    lines = [completion_line(index) for index in range(7)]
    lines[2] = completion_line(2, prompt=[1, LETHAL])
    with box.running("intake"):
        batch_id, other_id = box.add(lines), box.add([completion_line(index) for index in range(5)])
        box.until(lambda: len(box.queue) == 4)
        num_deaths = 0
        while not _outlives(box, batch_id, other_id):
            num_deaths += 1
            assert num_deaths <= 7  # three among others, then of 4, 2, 1 and 1 lines
    assert box.batch(other_id).request_counts.completed == 5
    batch = box.batch(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.request_counts.completed, batch.request_counts.failed) == (6, 1)
    (row,) = box.rows(batch.error_file_id)
    assert (row["custom_id"], row["response"]["status_code"]) == ("c-2", 500)
    _conserved(box, batch_id, 7)
    assert not box.redis.keys("freight:deaths:*")


def test_kills_by_an_operator_blame_no_line(box: Box) -> None:
    box.settings = dataclasses.replace(box.settings, lease_s=1)
    batch_id = box.add([completion_line(index, max_tokens=20) for index in range(4)])
    with box.running("intake"):
        for _ in range(5):  # up to where its lines run one by one
            _killed_at_work(box)
        with box.running("worker"):
            assert box.wait(batch_id).request_counts.completed == 4


def test_a_stopped_shard_leaves_the_block_and_comes_again(box: Box) -> None:
    batch_id = box.add([completion_line(index, max_tokens=30) for index in range(8)])
    with box.running("intake"), box.running("worker", sweep_s=0.05):
        box.until(lambda: box.queue.started_job_registry.count == 2)
        job_id, execution_id = box.queue.started_job_registry.get_job_and_execution_ids()[1]
        box.until(lambda: Job.fetch(job_id, connection=box.redis).is_started)
        send_stop_execution_command(box.redis, job_id, execution_id)
        assert box.wait(batch_id).request_counts.completed == 8
    assert max(collections.Counter(box.submitted()).values()) == 2


def test_a_start_that_cannot_succeed_says_so_in_one_line(box: Box, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "config.json").write_text("{}")
    for role in ("intake", "worker"):
        ended = subprocess.run(
            [sys.executable, "-m", "cli.main", role],
            env=os.environ | box.settings.to_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == os.EX_CONFIG
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert str(tmp_path / "tiny") in line
