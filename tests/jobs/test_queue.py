"""The doorbell on a real Valkey: rung once, rung again when it was lost."""

from collections.abc import Iterator

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job, JobStatus

from jobs.queue import BLOCK_QUEUE, FINALIZE_TASK, INTAKE_QUEUE, VALIDATE_TASK, Doorbell


@pytest.fixture
def redis(valkey_url: str) -> Iterator[Redis]:
    with Redis.from_url(valkey_url) as redis:
        redis.flushall()
        yield redis


def test_tasks_lie_on_their_queues_under_names_that_tell(redis: Redis) -> None:
    bell = Doorbell(redis)
    bell.validate("b")
    bell.finalize("b")
    bell.shard("b", 3)
    intake, blocks = Queue(INTAKE_QUEUE, connection=redis), Queue(BLOCK_QUEUE, connection=redis)
    assert [job.func_name for job in intake.jobs] == [VALIDATE_TASK, FINALIZE_TASK]
    assert blocks.job_ids == ["shard-b-3"]
    assert blocks.jobs[0].args == ("b", 3)


def test_ringing_twice_is_ringing_once(redis: Redis) -> None:
    bell = Doorbell(redis)
    bell.validate("b")
    bell.validate("b")
    assert Queue(INTAKE_QUEUE, connection=redis).job_ids == ["validate-b"]


def test_a_lost_bell_is_rung_again(redis: Redis) -> None:
    bell = Doorbell(redis)
    bell.validate("b")
    redis.flushall()
    bell.validate("b")
    assert Queue(INTAKE_QUEUE, connection=redis).job_ids == ["validate-b"]


def test_a_task_whose_owner_is_gone_is_rung_again(redis: Redis) -> None:
    bell = Doorbell(redis)
    bell.validate("b")
    queue = Queue(INTAKE_QUEUE, connection=redis)
    queue.remove("validate-b")
    Job.fetch("validate-b", connection=redis).set_status(JobStatus.STARTED)
    bell.validate("b")
    assert queue.job_ids == ["validate-b"]
