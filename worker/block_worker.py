"""The RQ worker that holds many jobs at once: their lines make one block, swept until all are done.

Knows the queue's side of a shard and of a party of riders; what is in them is the accumulator's affair.
"""

import math
import time
import traceback
from collections.abc import Callable
from typing import Final

import structlog
from redis import Redis
from rq import Queue
from rq.exceptions import DeserializationError
from rq.job import Job
from rq.worker import WorkerStatus

from jobs.errors import RequestError
from jobs.line_group import WaitingBatch
from jobs.queue import BLOCK_QUEUE, RIDERS_TASK, SHARD_TASK, Doorbell, has_riders_first
from jobs.settings import Settings
from worker.accumulator import Accumulator
from worker.carrier import Carrier, JobKey
from worker.deaths import Deaths, Suspicion
from worker.feed import Feeder
from worker.leased_worker import Claim, LeasedWorker
from worker.model import Engine, Replanner
from worker.pace import PaceMeter
from worker.run_report import RIDERS, RunReport
from worker.trials import EngineBrokenError, EngineDeadError

log: Final = structlog.get_logger(__name__)
_POLL_S: Final = 0.02
_RIDER_PAUSE_S: Final = 0.04  # riders that come together are gathered; one alone hardly waits
_CLAIM_AHEAD: Final = 2  # blocks of rows held, so that a refill never waits for the queue
_REPLAN_S: Final = 60.0  # within a busy period
_NUM_FAILURES: Final = "engine_failures"


def run_shard(batch_id: str, shard_index: int) -> None:
    """The task's name, for those who ring. Only a block worker can do it, and never calls this."""
    raise RuntimeError(f"shard {shard_index} of {batch_id} came to a worker without an engine")


def run_riders(party_id: str) -> None:
    """Likewise."""
    raise RuntimeError(f"the riders of {party_id} came to a worker without an engine")


class BlockWorker(LeasedWorker):
    def __init__(
        self,
        settings: Settings,
        *,
        connection: Redis,
        engine: Engine,
        accumulator: Accumulator,
        doorbell: Doorbell,
        feeder: Feeder,
        run_report: RunReport,
        pace: PaceMeter,
        replanner: Replanner | None,
        waiting: Callable[[], list[WaitingBatch]],
    ) -> None:
        """`waiting` tells what is open, of this worker's model."""
        super().__init__(
            BLOCK_QUEUE, connection=connection, lease_s=settings.lease_s, stall_s=settings.stall_s
        )
        self._window_s = settings.accumulation_window_s
        self._shard_lines = settings.shard_lines
        self._least_ahead = settings.shards_ahead
        self._engine = engine
        self._accumulator = accumulator
        self._riders = accumulator.riders
        self._doorbell = doorbell
        self._feeder = feeder
        self._run_report = run_report
        self._pace = pace
        self._replanner = replanner
        self._waiting = waiting
        self._planned_at = -math.inf
        self.wants_load = False  # the engine had better be loaded anew: nothing more comes in
        self._reported = engine.report()  # what earlier busy periods told
        self._deaths = Deaths(connection)
        self._claims: dict[JobKey, Claim] = {}
        self._feed_a_block()
        self._is_apart = False  # a suspect job runs, or waits for the rest: nothing else comes in
        self._stopped_jobs: set[str] = set()

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Carry this job, and all that can be claimed beside it, until none is held."""
        self._is_apart = False
        self._planned_at = -math.inf
        try:
            self._pace.begin()
            self._replan()
            with self.despite_lost_redis():
                self._take(job)
            self._gather()
            while self._claims and not self._stop_requested:
                self._drop_ended()
                self._sweep()
                self._finish_done()
                self._replan()
                self._refill()
        except Exception as error:  # noqa: BLE001 - engine or ledger: this process cannot go on
            self._note_failure(error)
        finally:
            self._give_back()
            self._close_report()
            self._stop_requested = self._stop_requested or self.wants_load
        with self.despite_lost_redis():
            self.set_state(WorkerStatus.IDLE)

    def _close_report(self) -> None:
        report = self._engine.report()
        period = report.since(self._reported)
        prediction = self._replanner.settle(period) if self._replanner else None
        self._run_report.close(period, prediction)
        self._reported = report

    def _replan(self) -> None:
        """At a busy period's beginning and now and then in it. While the engine waits to be loaded
        anew, what it holds is brought to its end.
        """
        if self._replanner is None or self.wants_load:
            return
        if time.monotonic() - self._planned_at < _REPLAN_S:
            return
        self.wants_load = self._replanner.consider(self._waiting())
        self._planned_at = time.monotonic()
        self._feed_a_block()

    def _feed_a_block(self) -> None:
        """One batch alone must be able to fill the block and what is claimed beside it."""
        shards = math.ceil(_CLAIM_AHEAD * self._engine.block_rows / self._shard_lines)
        self._feeder.ahead = max(self._least_ahead, shards)

    def pulse(self) -> int:
        """However long a sweep is, its steps are not."""
        return self._engine.num_steps

    def request_stop_execution(self, execution_id: str) -> None:
        """An operator stops one shard; called from RQ's listening thread."""
        execution = self.executions.get(execution_id)
        if execution is not None:
            self._stopped_jobs.add(execution.job_id)

    def _gather(self) -> None:
        """Wait for a full block, but for no longer than the window after the first line; with riders
        in it only as long as more is coming.
        """
        began = last_came = time.monotonic()
        while self._accumulator.num_rows < self._engine.block_rows:
            now = time.monotonic()
            is_over = now - began >= self._window_s
            if self._riders.num_held:
                is_over |= now - last_came >= _RIDER_PAUSE_S
            if self._is_closed or self._stop_requested or is_over:
                return
            if self._take_next():
                last_came = time.monotonic()
            else:
                time.sleep(_POLL_S)

    def _refill(self) -> None:
        """Shards as far as there is use for them, riders all: they take the next free places."""
        target = _CLAIM_AHEAD * self._engine.block_rows
        while self._accumulator.num_rows < target or self._has_riders_first():
            if not self._take_next():
                return

    def _has_riders_first(self) -> bool:
        with self.despite_lost_redis():
            if has_riders_first(self.queue):
                return True
        return False

    def _sweep(self) -> None:
        rows = self._accumulator.rows_by_batch()
        if self._riders.num_held:
            rows[RIDERS] = self._riders.num_held
        if not rows:
            return
        swept = self._accumulator.sweep()
        num_settled = self._accumulator.record(swept)
        num_answered = self._riders.record(swept)
        if (num_settled or num_answered) and self._is_apart:
            self._note_harmless()
        self._run_report.note(rows, num_settled=num_settled, num_riders=num_answered)
        self._pace.note(self._replanner)
        self.progressed()

    def _take_next(self) -> bool:
        """Claim one more shard; whether there was one."""
        if self._is_closed:
            return False
        with self.despite_lost_redis():
            job = self.next_job()
            if job is None:
                self._feeder.feed_all()
                job = self.next_job()
            if job is not None:
                self._take(job)
                return True
        return False

    @property
    def _is_closed(self) -> bool:
        """Whether nothing comes in beside what is held."""
        return self._is_apart or self.wants_load

    def _take(self, job: Job) -> None:
        suspicion = self._deaths.suspicion(job.id)
        claim = self.claim(job)
        if self.wants_load:
            self.give_back(claim)
            return
        try:
            key = _key_of(job, self.start(claim))
            held = self._claims.get(key)
            if held is None and suspicion.at_once is not None:
                self._is_apart = True
                if self._claims:  # it is the first to be taken when these are done
                    self.give_back(claim)
                    return
            if held is None:
                self._enter(claim, key, suspicion)
        except (DeserializationError, RequestError, ValueError, TypeError):
            self.fail(claim)
            return
        self._claims[key] = claim
        if held is not None:  # rung anew after Redis forgot it; its rows are in the block already
            self.forget(held)

    def _carrier(self, claim: Claim) -> Carrier:
        return self._riders if claim.job.func_name == RIDERS_TASK else self._accumulator

    def _enter(self, claim: Claim, key: JobKey, suspicion: Suspicion) -> None:
        carrier = self._carrier(claim)
        if suspicion.is_proven:
            carrier.blame_first(key)
            suspicion = Suspicion(at_once=self._shard_lines)
        num_lines = carrier.take(
            key,
            at_once=suspicion.at_once,
            on_last_try=bool(claim.job.meta.get(_NUM_FAILURES)),
        )
        if num_lines:
            with self.despite_lost_redis():
                self._deaths.hold(claim.job.id, suspicion, num_lines=num_lines)

    def _note_harmless(self) -> None:
        with self.despite_lost_redis():
            for key, claim in self._claims.items():
                if num_lines := self._carrier(claim).num_open(key):
                    self._deaths.settled(claim.job.id, num_lines=num_lines)

    def _drop_ended(self) -> None:
        self._accumulator.drop_ended()
        self._riders.drop_ended()
        for key, claim in list(self._claims.items()):
            if claim.job.id in self._stopped_jobs:
                self._stopped_jobs.discard(claim.job.id)
                self._carrier(claim).drop(key)
                del self._claims[key]
                with self.despite_lost_redis():
                    self.stop(claim)
                    self._deaths.forget(claim.job.id)

    def _finish_done(self) -> None:
        done = self._accumulator.pop_done()
        settled = {shard.batch.id for shard in done if shard.is_last}
        wanting = {shard.batch.id for shard in done if not shard.is_given_up} - settled
        with self.despite_lost_redis():
            for batch_id in settled:
                self._doorbell.finalize(batch_id)
            for batch_id in wanting:
                self._feeder.feed(batch_id)
        for key in [*(shard.key for shard in done), *self._riders.pop_done()]:
            claim = self._claims.pop(key)
            with self.despite_lost_redis():  # on its own: a claim must not outlive its job
                self.finish(claim)
                self._deaths.forget(claim.job.id)

    def _give_back(self) -> None:
        """Last claimed first, each to the front: the queue's order is as it was.

        Their rows stay in the block: this process is about to end, and its engine may be broken.
        Where the engine is dead, the process as good as died over them.
        """
        for claim in reversed(self._claims.values()):
            if not isinstance(self.failure, EngineDeadError):
                with self.despite_lost_redis():
                    self._deaths.let_go(claim.job.id)
            with self.despite_lost_redis():
                self.give_back(claim)
        self._claims.clear()

    def _note_failure(self, error: Exception) -> None:
        # As text: a rendered traceback would show its locals, and with them prompts.
        trace = "".join(traceback.format_exception(error))
        log.error("the worker fails", worker=self.name, error=repr(error), traceback=trace)
        self.failure = error
        self._stop_requested = True
        if isinstance(error, EngineBrokenError):
            for claim in self._claims.values():
                claim.job.meta[_NUM_FAILURES] = claim.job.meta.get(_NUM_FAILURES, 0) + 1


def _key_of(job: Job, arguments: tuple[object, ...]) -> JobKey:
    """Raises ValueError or TypeError for what is neither a shard nor a party."""
    if job.func_name == RIDERS_TASK:
        arguments = (*arguments, 0)
    elif job.func_name != SHARD_TASK:
        raise ValueError(f"{job.func_name} is neither {SHARD_TASK} nor {RIDERS_TASK}")
    if len(arguments) != 2:
        raise ValueError(f"{arguments} are not the arguments of {job.func_name}")
    origin_id, index = arguments
    if not isinstance(origin_id, str) or not isinstance(index, int):
        raise TypeError(f"{arguments} name no shard")
    return origin_id, index
