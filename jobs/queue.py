"""The doorbell: names of queues and tasks, and ringing them over RQ; no truth lives here.

Tasks are named by string, so that whoever rings imports nothing of whoever answers. All of it can
be lost: the ledger knows what is due, and `worker.reconcile` rings again.
"""

import time
from collections.abc import Collection, Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from redis import Redis
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.executions import ExecutionRegistry
from rq.job import Job, JobStatus
from rq.results import Result

INTAKE_QUEUE: Final = "freight-intake"
BLOCK_QUEUE: Final = "freight-blocks"

VALIDATE_TASK: Final = "worker.intake.validate"
FINALIZE_TASK: Final = "worker.finalize.finalize"
SHARD_TASK: Final = "worker.block_worker.run_shard"
RIDERS_TASK: Final = "worker.block_worker.run_riders"

# A lease that lapses puts the job back on its queue; the ledger keeps a repeat harmless.
_RETRY: Final = Retry(max=1_000)
_RETRY_FIRST: Final = Retry(max=1_000, enqueue_at_front=True)
_PARTY: Final = "riders-"
_POP_TO_CLAIM: Final = timedelta(seconds=5)
_FAILURE_TTL_S: Final = 7 * 86_400
_SHARD_PREFIX: Final = "shard-"
# In one step, so that a name that a worker takes meanwhile is neither lost nor there twice.
_MOVE_BEFORE: Final = """
if redis.call('LREM', KEYS[1], -1, ARGV[1]) == 0 then return 0 end
if redis.call('LINSERT', KEYS[1], 'BEFORE', ARGV[2], ARGV[1]) > 0 then return 1 end
-- What it goes before was taken meanwhile, and with it all that came earlier.
return redis.call('LPUSH', KEYS[1], ARGV[1])
"""


class Doorbell:
    """Rings tasks. Ringing one that is already waiting or alive does nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._intake = Queue(INTAKE_QUEUE, connection=redis)
        self._blocks = Queue(BLOCK_QUEUE, connection=redis)

    def validate(self, batch_id: str) -> None:
        self._ring(self._intake, VALIDATE_TASK, f"validate-{batch_id}", batch_id)

    def finalize(self, batch_id: str) -> None:
        self._ring(self._intake, FINALIZE_TASK, f"finalize-{batch_id}", batch_id)

    def shard(self, batch_id: str, shard_index: int, *, before: Collection[str] = ()) -> None:
        """Behind all that waits, but for shards of the batches named in `before`."""
        job_id = shard_job_id(batch_id, shard_index)
        self._ring(self._blocks, SHARD_TASK, job_id, batch_id, shard_index)
        if before:
            self._move_up(job_id, before)

    def riders(self, party_id: str) -> None:
        """Ahead of all shards: somebody waits."""
        self._ring(self._blocks, RIDERS_TASK, f"{_PARTY}{party_id}", party_id, is_first=True)

    def missing_parties(self, party_ids: Iterable[str]) -> list[str]:
        """Those of the parties that neither wait nor are held: one look at the queue for all."""
        rung = self._waiting_or_held(self._blocks)
        return [party_id for party_id in party_ids if f"{_PARTY}{party_id}" not in rung]

    def missing_shards(self, batch_id: str, shard_indices: Iterable[int]) -> list[int]:
        """Those of the shards that neither wait nor are held: one look at the queue for all."""
        rung = self._waiting_or_held(self._blocks)
        return [index for index in shard_indices if shard_job_id(batch_id, index) not in rung]

    def _waiting_or_held(self, queue: Queue) -> set[str]:
        # In the order in which a job moves, so that one that moves meanwhile is seen.
        names = [
            *self._redis.lrange(queue.key, 0, -1),
            *self._between_pop_and_claim(queue),
        ]
        held = self._redis.zrangebyscore(queue.started_job_registry.key, time.time(), "+inf")
        names += [name.rpartition(b":")[0] for name in map(_as_bytes, held)]
        return {_as_bytes(name).decode() for name in names}

    def _move_up(self, job_id: str, before: Collection[str]) -> None:
        waiting = [_as_bytes(name).decode() for name in self._redis.lrange(self._blocks.key, 0, -1)]
        behind = next((each for each in waiting if _batch_of(each) in before), None)
        if behind is not None:
            self._redis.eval(_MOVE_BEFORE, 1, self._blocks.key, job_id, behind)

    def _ring(
        self, queue: Queue, task: str, job_id: str, *arguments: str | int, is_first: bool = False
    ) -> None:
        for _ in range(2):
            try:
                queue.enqueue_call(
                    task,
                    args=arguments,
                    job_id=job_id,
                    unique=True,
                    timeout=-1,  # leases and the engine's own stall bound watch it
                    result_ttl=0,
                    failure_ttl=_FAILURE_TTL_S,
                    retry=_RETRY_FIRST if is_first else _RETRY,
                    at_front=is_first,
                )
            except DuplicateJobError:
                if self._is_alive(queue, job_id):
                    return
                self._forget(queue, job_id)
            else:
                return

    def _between_pop_and_claim(self, queue: Queue) -> list[str]:
        # It takes milliseconds to get from the one to the other: what stays there lost its worker.
        between = queue.intermediate_queue
        oldest = datetime.now(UTC) - _POP_TO_CLAIM
        return [
            job_id
            for job_id in between.get_job_ids()
            if between.set_first_seen(job_id) or (between.get_first_seen(job_id) or oldest) > oldest
        ]

    def _is_alive(self, queue: Queue, job_id: str) -> bool:
        """Whether the job waits on its queue, or is held by someone whose lease runs."""
        if queue.get_job_position(job_id) is not None:
            return True
        if job_id in self._between_pop_and_claim(queue):
            return True
        try:
            job = Job.fetch(job_id, connection=self._redis)
        except NoSuchJobError:
            return False
        if job.get_status() is not JobStatus.STARTED:
            return False
        held = self._redis.zrangebyscore(queue.started_job_registry.key, time.time(), "+inf")
        return any(name.startswith(f"{job_id}:".encode()) for name in map(_as_bytes, held))

    def _forget(self, queue: Queue, job_id: str) -> None:
        """Remove every trace of a dead job. A lapsed entry left behind would count against the
        next job of this name: RQ would take that one for abandoned.
        """
        started, between = queue.started_job_registry, queue.intermediate_queue
        held = map(_as_bytes, self._redis.zrange(started.key, 0, -1))
        lapsed = [name for name in held if name.startswith(f"{job_id}:".encode())]
        with self._redis.pipeline() as pipeline:
            if lapsed:
                pipeline.zrem(started.key, *lapsed)
            pipeline.zrem(queue.failed_job_registry.key, job_id)
            pipeline.lrem(between.key, 0, job_id)
            pipeline.delete(
                Job.key_for(job_id),
                ExecutionRegistry(job_id, connection=self._redis).key,
                Result.get_key(job_id),  # type: ignore[no-untyped-call]
                between.get_first_seen_key(job_id),
            )
            pipeline.execute()


def shard_job_id(batch_id: str, shard_index: int) -> str:
    return f"{_SHARD_PREFIX}{batch_id}-{shard_index}"


def _batch_of(job_id: str) -> str:
    return job_id.removeprefix(_SHARD_PREFIX).rpartition("-")[0]


def has_riders_first(queue: Queue) -> bool:
    """Whether the next job of the queue is riders', in one small look."""
    first = queue.connection.lindex(queue.key, 0)
    return first is not None and _as_bytes(first).startswith(_PARTY.encode())


def _as_bytes(name: object) -> bytes:
    return name if isinstance(name, bytes) else str(name).encode()
