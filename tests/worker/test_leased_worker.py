"""The lease: it lives with its worker, ends with it, and ends when work stalls."""

import dataclasses
import os
import signal
import threading
import time

import pytest
from redis import Redis
from rq import Queue
from rq.utils import import_attribute

from jobs.batch import BatchStatus
from jobs.queue import BLOCK_QUEUE, FINALIZE_TASK, INTAKE_QUEUE, SHARD_TASK, VALIDATE_TASK
from tests.support.box import Box, completion_line
from tests.support.valkey import running_valkey
from worker.leased_worker import LeasedWorker


def test_the_task_names_resolve() -> None:
    for name in (VALIDATE_TASK, FINALIZE_TASK, SHARD_TASK):
        assert callable(import_attribute(name))


def test_a_sweep_far_longer_than_the_lease_keeps_its_shards(box: Box) -> None:
    batch_id = box.add([completion_line(0, max_tokens=1)])
    with box.running("intake"), box.running("worker", sweep_s=2.8):
        box.until(lambda: box.queue.started_job_registry.count == 1)
        assert box.wait(batch_id).request_counts.completed == 1
    assert len(box.submitted()) == 1


def test_a_worker_beats_on_whatever_a_beat_meets(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def raise_at_first(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("nobody thought of this")

    worker = LeasedWorker(INTAKE_QUEUE, connection=box.redis, lease_s=1, stall_s=60)
    monkeypatch.setattr(worker, "_beat", raise_at_first)
    stopped = threading.Event()
    beat = threading.Thread(target=worker._beat_until, args=(stopped,), daemon=True)
    beat.start()
    box.until(lambda: len(calls) > 1)
    stopped.set()
    beat.join()


def test_a_stalled_worker_ends_itself(box: Box) -> None:
    box.settings = dataclasses.replace(box.settings, stall_s=1.0)
    batch_id = box.add([completion_line(0, max_tokens=1)])
    with box.running("intake"):
        with box.running("worker", sweep_s=600) as worker:
            assert worker.wait(20) == 70
        with box.running("worker"):
            assert box.wait(batch_id).status is BatchStatus.COMPLETED


def test_a_sweep_far_longer_than_the_stall_limit_goes_on_while_its_layers_do(box: Box) -> None:
    box.settings = dataclasses.replace(box.settings, stall_s=1.0)
    batch_id = box.add([completion_line(0, max_tokens=1)])
    with box.running("intake"), box.running("worker", sweep_s=4.0, num_layers=20) as worker:
        assert box.wait(batch_id).request_counts.completed == 1
        assert worker.poll() is None
    assert len(box.submitted()) == 1


def test_a_task_that_raises_is_failed_once_and_rung_again_later(box: Box) -> None:
    batch_id = box.add([completion_line(0)])
    box.store.delete(f"input-{batch_id}")
    (box.settings.files_dir / f"input-{batch_id}").mkdir()  # reading it raises
    with box.running("intake"):
        failed = Queue(INTAKE_QUEUE, connection=box.redis).failed_job_registry
        box.until(lambda: failed.get_job_ids() == [f"validate-{batch_id}"])
        (box.settings.files_dir / f"input-{batch_id}").rmdir()
        assert box.wait(batch_id).status is BatchStatus.FAILED


def test_roles_outlive_their_redis(box: Box) -> None:
    with running_valkey() as url:
        other = Box(box.settings.state_dir.parent, url)
        batch_id = other.add([completion_line(index, max_tokens=50) for index in range(8)])
        with other.running("intake") as intake, other.running("worker", sweep_s=0.03) as worker:
            other.until(lambda: other.queue.started_job_registry.count == 2)
            redis: Redis = other.redis
            pid = redis.info("server")["process_id"]
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.5)
            os.kill(pid, signal.SIGCONT)
            redis.client_kill_filter(_type="normal", skipme=True)
            redis.client_kill_filter(_type="pubsub")
            assert other.wait(batch_id).request_counts.completed == 8
            later = other.add([completion_line(0)])
            assert other.wait(later).request_counts.completed == 1
            assert (intake.poll(), worker.poll()) == (None, None)
        assert Queue(BLOCK_QUEUE, connection=redis).started_job_registry.count == 0
        other.close()
