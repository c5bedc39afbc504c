"""Who is at work: RQ workers as Redis shows them; readiness of processes, health of containers.

RQ workers register when they begin to listen, the worker after its model is loaded, and their
entries lapse by themselves when they fall silent. Before any of that, Redis itself must answer.
"""

import socket
from collections.abc import Callable
from typing import Final

import redis
import rq
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq.worker import BaseWorker

from cli.errors import StartError

_ANSWER_LIMIT_S: Final = 3.0


def require_redis(redis_url: str) -> None:
    """Raises StartError unless something answers there; its message never has the password."""
    try:
        client = redis.Redis.from_url(
            redis_url,
            socket_connect_timeout=_ANSWER_LIMIT_S,
            socket_timeout=_ANSWER_LIMIT_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError:  # its text may quote what stands before the host
        raise StartError(
            "FREIGHT_REDIS_URL is not the address of a Redis; write redis://127.0.0.1:6379/0"
        ) from None
    with client:
        try:
            client.ping()
        except redis.RedisError as error:
            raise StartError(
                f"no Redis answers at {_address(client)} ({error}); look at FREIGHT_REDIS_URL, "
                "or leave it out: `freight serve` then starts its own"
            ) from None


def _address(client: redis.Redis) -> str:
    told = client.connection_pool.connection_kwargs
    return str(told.get("path") or f"{told.get('host', 'localhost')}:{told.get('port', 6379)}")


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
