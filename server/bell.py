"""The doorbell as routes may use it: a dead or absent Redis is logged, never a failed request.

Nothing is lost by it: the ledger knows what is due, and `worker.reconcile` rings again.
"""

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import structlog
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue, Worker

from jobs.queue import BLOCK_QUEUE, INTAKE_QUEUE, Doorbell

# A request waits this long at most for a Redis that does not answer.
_TIMEOUT_S: Final = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """Who was heard of lately. Seconds since the freshest heartbeat; None: nobody is known."""

    redis: str
    block_worker_age_s: float | None = None
    intake_worker_age_s: float | None = None


class Bell:
    """Open once a process; safe from several threads. Close when done."""

    def __init__(self, redis: Redis | None) -> None:
        self._redis = redis
        self._doorbell = None if redis is None else Doorbell(redis)

    @classmethod
    def open(cls, redis_url: str | None) -> "Bell":
        """Connects on first use. Without a URL nothing is rung and all is left to the worker."""
        if redis_url is None:
            return cls(None)
        redis = Redis.from_url(
            redis_url,
            socket_connect_timeout=_TIMEOUT_S,
            socket_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        return cls(redis)

    def close(self) -> None:
        if self._redis is not None:
            self._redis.close()

    def validate(self, batch_id: str) -> None:
        if self._doorbell is not None:
            self._ring(self._doorbell.validate, batch_id)

    def finalize(self, batch_id: str) -> None:
        if self._doorbell is not None:
            self._ring(self._doorbell.finalize, batch_id)

    def riders(self, party_id: str) -> None:
        if self._doorbell is not None:
            self._ring(self._doorbell.riders, party_id)

    def presence(self) -> Presence:
        """Heartbeat ages, not keys: a dead worker's key outlives it by minutes."""
        if self._redis is None:
            return Presence(redis="absent")
        try:
            return Presence(
                redis="ok",
                block_worker_age_s=_heartbeat_age_s(self._redis, BLOCK_QUEUE),
                intake_worker_age_s=_heartbeat_age_s(self._redis, INTAKE_QUEUE),
            )
        except (RedisError, OSError):
            return Presence(redis="unreachable")

    def _ring(self, ring: Callable[[str], None], name: str) -> None:
        try:
            ring(name)
        except (RedisError, OSError) as error:
            structlog.get_logger().warning("doorbell not rung", rung_for=name, error=str(error))


def _heartbeat_age_s(redis: Redis, queue_name: str) -> float | None:
    now = datetime.now(UTC)
    workers = Worker.all(queue=Queue(queue_name, connection=redis))
    ages = [
        (now - worker.last_heartbeat).total_seconds() for worker in workers if worker.last_heartbeat
    ]
    return min(ages, default=None)
