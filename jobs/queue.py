"""The doorbell: names of queues and tasks, and ringing them over RQ; no truth lives here.

Tasks are named by string, so that whoever rings imports nothing of whoever answers. All of it can
be lost: the ledger knows what is due, and `worker.reconcile` rings again.
"""

import time
from typing import Final

from redis import Redis
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job, JobStatus

INTAKE_QUEUE: Final = "freight-intake"
BLOCK_QUEUE: Final = "freight-blocks"

VALIDATE_TASK: Final = "worker.intake.validate"
FINALIZE_TASK: Final = "worker.finalize.finalize"
SHARD_TASK: Final = "worker.block_worker.run_shard"

# A lease that lapses puts the job back on its queue; the ledger keeps a repeat harmless.
_RETRY: Final = Retry(max=1_000)
_FAILURE_TTL_S: Final = 7 * 86_400


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

    def shard(self, batch_id: str, shard_index: int) -> None:
        name = f"shard-{batch_id}-{shard_index}"
        self._ring(self._blocks, SHARD_TASK, name, batch_id, shard_index)

    def _ring(self, queue: Queue, task: str, job_id: str, *arguments: str | int) -> None:
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
                    retry=_RETRY,
                )
            except DuplicateJobError:
                if self._is_alive(queue, job_id):
                    return
                self._forget(job_id)
            else:
                return

    def _is_alive(self, queue: Queue, job_id: str) -> bool:
        """Whether the job waits on its queue, or is held by someone whose lease runs."""
        if queue.get_job_position(job_id) is not None:
            return True
        if job_id in IntermediateQueue(queue.intermediate_queue_key, self._redis).get_job_ids():
            return True
        try:
            job = Job.fetch(job_id, connection=self._redis)
        except NoSuchJobError:
            return False
        if job.get_status() is not JobStatus.STARTED:
            return False
        held = self._redis.zrangebyscore(queue.started_job_registry.key, time.time(), "+inf")
        return any(name.startswith(f"{job_id}:".encode()) for name in map(_as_bytes, held))

    def _forget(self, job_id: str) -> None:
        try:
            Job.fetch(job_id, connection=self._redis).delete()
        except NoSuchJobError:
            return


def _as_bytes(name: object) -> bytes:
    return name if isinstance(name, bytes) else str(name).encode()
