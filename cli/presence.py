"""Who is at work: RQ workers as Redis shows them; readiness of processes, health of containers.

RQ workers register when they begin to listen, the worker after its model is loaded, and their
entries lapse by themselves when they fall silent.
"""

import socket
from collections.abc import Callable

import redis
import rq
from rq.worker import BaseWorker


def process_is_present(redis_url: str) -> Callable[[int], bool]:
    """Whether the process of that id, on this machine, listens on a queue."""
    host = socket.gethostname()
    return lambda process_id: any(
        worker.pid == process_id and worker.hostname == host for worker in _present(redis_url)
    )


def host_is_present(redis_url: str) -> bool:
    """Whether any worker of this host listens: each container is a host of its own."""
    host = socket.gethostname()
    return any(worker.hostname == host for worker in _present(redis_url))


def _present(redis_url: str) -> list[BaseWorker]:
    with redis.Redis.from_url(redis_url) as connection:
        try:
            return list(rq.Worker.all(connection=connection))
        except redis.RedisError:
            return []
