"""An RQ worker with a short, living lease; the one module that knows RQ 3.0's inner methods.

RQ's own clocks are minutes. Here a worker that dies, or whose work stalls, is known within one
lease. It holds any number of jobs at once, and can give one back to the front of its queue.
"""

import contextlib
import dataclasses
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import structlog
from redis import Redis
from redis import exceptions as redis_errors
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker, worker_registration
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.timeouts import TimerDeathPenalty
from rq.utils import now
from rq.worker import WorkerStatus

log: Final = structlog.get_logger(__name__)
_BEATS_PER_LEASE: Final = 5
_RQ_TTL_MARGIN_S: Final = 15  # RQ waits on its queue for its time to live less this
_STALLED_STATUS: Final = 70


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A job this worker holds."""

    job: Job
    execution: Execution


class LostJobError(RedisError):
    """Redis no longer knows the job, or only half of it."""


class _ToughQueue(Queue):
    """A queue on which a job that cannot even be read is passed over, not died of."""

    @classmethod
    def _fetch_dequeued_job(
        cls, connection: Redis, queue_key: str, job_id: str, *args: Any, **options: Any
    ) -> tuple[Job, Queue] | None:
        try:
            return super()._fetch_dequeued_job(connection, queue_key, job_id, *args, **options)
        except (redis_errors.ConnectionError, redis_errors.TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not ours
            log.warning("an unreadable job is dropped", job_id=job_id, error=repr(error))
            connection.lrem(
                cls.from_queue_key(queue_key, connection).intermediate_queue_key, 1, job_id
            )
            return None


class LeasedWorker(SimpleWorker):
    """Runs plain tasks as it is, one by one, on exactly one queue: on several, RQ can lose jobs."""

    death_penalty_class = TimerDeathPenalty  # never SIGALRM: it would interrupt a whole block
    queue_class = _ToughQueue
    max_connection_wait_time = 5.0

    def __init__(self, queue_name: str, *, connection: Redis, lease_s: int, stall_s: float) -> None:
        self.queue = _ToughQueue(queue_name, connection=connection)
        super().__init__(
            [self.queue],
            name=f"{queue_name}-{secrets.token_hex(4)}",
            connection=connection,
            worker_ttl=_RQ_TTL_MARGIN_S + max(1, lease_s // 3),
            maintenance_interval=max(1, lease_s // 3),
            log_job_description=False,
        )
        self.failure: Exception | None = None  # why the process cannot go on
        self._lease_s = lease_s
        self._stall_s = stall_s
        self._progressed_at = time.monotonic()

    def run(self) -> bool:
        """Work until a signal says stop: True. False: the connection was lost, or work failed."""
        stopped = threading.Event()
        beat = threading.Thread(target=self._beat_until, args=(stopped,), daemon=True)
        beat.start()
        try:
            with self.despite_lost_redis():
                self.work(logging_level="WARNING")
        finally:
            stopped.set()
            beat.join()
            self._state = WorkerStatus.IDLE  # a signal that comes now finds nothing to wait for
        return self._shutdown_requested_date is not None

    def progressed(self) -> None:
        """Say that the work moves: what does not for `stall_s` counts as dead."""
        self._progressed_at = time.monotonic()

    def pulse(self) -> int:
        """Changes while the work moves inside a call that says nothing until its end. Asked for by
        another thread.
        """
        return 0

    def execute_job(self, job: Job, queue: Queue) -> None:
        self.progressed()
        super().execute_job(job, queue)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        return self._lease_s

    def handle_job_failure(self, job: Job, queue: Queue, *args: Any, **options: Any) -> None:
        # Retries are for lapsed leases. A task that raised would raise again at once: it is shown
        # as failed, and reconcile rings it again in its own time.
        job.retries_left = 0
        super().handle_job_failure(job, queue, *args, **options)

    def teardown(self) -> None:
        with self.despite_lost_redis():
            super().teardown()  # type: ignore[no-untyped-call]

    def set_shutdown_requested_date(self) -> None:
        with self.despite_lost_redis():  # called from a signal handler
            super().set_shutdown_requested_date()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def despite_lost_redis(self) -> Iterator[None]:
        """Redis is the doorbell, not the truth: what is lost with it is rung again."""
        try:
            yield
        except RedisError as error:
            log.warning("redis is lost, going on", worker=self.name, error=str(error))

    def next_job(self) -> Job | None:
        """Another job of the queue, without waiting."""
        found = self.queue_class.dequeue_any(
            [self.queue],
            None,
            connection=self.connection,
            job_class=self.job_class,
            serializer=self.serializer,
            death_penalty_class=self.death_penalty_class,
        )
        return None if found is None else found[0]

    def claim(self, job: Job) -> Claim:
        """Hold the job: from now on its lease is renewed."""
        self.progressed()
        execution = self.prepare_execution(job)
        return Claim(job=job, execution=execution)

    def start(self, claim: Claim) -> tuple[Any, ...]:
        """Show the job as started; its arguments. Raises DeserializationError for a damaged one."""
        with self._letting_go_on_loss(claim):
            self.prepare_job_execution(claim.job, remove_from_intermediate_queue=True)
        return tuple(claim.job.args)

    def finish(self, claim: Claim) -> None:
        """RQ's success path."""
        job, registry = claim.job, self.queue.started_job_registry
        with self._letting_go_on_loss(claim):
            job.ended_at = now()
            job._status = JobStatus.FINISHED  # noqa: SLF001
            self.handle_job_success(job, self.queue, registry, claim.execution)

    def fail(self, claim: Claim) -> None:
        """RQ's failure path, for the exception that is being handled."""
        with self._letting_go_on_loss(claim):
            self._finalize_failure(claim.job, self.queue, claim.execution, sys.exc_info())

    def stop(self, claim: Claim) -> None:
        """RQ's path for a job that an operator stopped."""
        self._stopped_job_id = claim.job.id
        claim.job.ended_at = now()
        with self._letting_go_on_loss(claim):
            self.handle_job_failure(claim.job, self.queue, execution=claim.execution)

    def forget(self, claim: Claim) -> None:
        """Drop a hold that another one of the same job has replaced."""
        with self._letting_go_on_loss(claim), self.connection.pipeline() as pipeline:
            self.cleanup_execution(claim.job, pipeline=pipeline, execution=claim.execution)
            pipeline.execute()

    def give_back(self, claim: Claim) -> None:
        """Put the job at the front of its queue, as if it had never been taken."""
        job = claim.job
        with self._letting_go_on_loss(claim), self.connection.pipeline() as pipeline:
            job.save_meta()  # type: ignore[no-untyped-call]
            self.cleanup_execution(job, pipeline=pipeline, execution=claim.execution)
            job.set_status(JobStatus.QUEUED, pipeline=pipeline)
            pipeline.hdel(job.key, "started_at", "worker_name")
            self.queue.push_job_id(job.id, pipeline=pipeline, at_front=True)
            pipeline.execute()

    @contextlib.contextmanager
    def _letting_go_on_loss(self, claim: Claim) -> Iterator[None]:
        # A job that is no longer worked on must not be kept alive when Redis is back.
        try:
            yield
        except RedisError:
            self.executions.pop(claim.execution.id, None)
            raise
        except (InvalidJobOperation, NoSuchJobError, ValueError, KeyError) as error:
            self.executions.pop(claim.execution.id, None)
            raise LostJobError(f"{claim.job.id}: {error!r}") from error

    def _beat_until(self, stopped: threading.Event) -> None:
        last_pulse = self.pulse()
        while not stopped.wait(self._lease_s / _BEATS_PER_LEASE):
            if (pulse := self.pulse()) != last_pulse:
                last_pulse = pulse
                self.progressed()
            silent_s = time.monotonic() - self._progressed_at
            if self.executions and silent_s > self._stall_s:
                # A wedged call cannot be interrupted from here; dead is better than mute.
                log.critical("no progress, giving up", worker=self.name, silent_s=silent_s)
                os._exit(_STALLED_STATUS)
            try:
                self._beat()
            except Exception as error:  # noqa: BLE001 - without this thread all leases lapse
                log.warning("a beat failed, going on", worker=self.name, error=repr(error))

    def _beat(self) -> None:
        for execution in list(self.executions.values()):
            self.maintain_heartbeats(execution.job, execution)
        # A flushed Redis has forgotten who works here.
        worker_registration.register(self)
        if not self.connection.hexists(self.key, "birth"):
            self.connection.hset(self.key, mapping=self.serialize())
            self.connection.expire(self.key, self.worker_ttl + 60)
