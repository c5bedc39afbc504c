"""How often a process died over a shard, and with how many of its lines: who is to blame for that.

Killed, crashed or stalled, or with an engine that is dead, a process cannot tell. So it writes down beforehand, with each shard it
claims, what is to be thought of the shard should it die. A shard that some processes have died over
runs apart from the others, then by halves, down to the line that dies alone: its first open one.

Kept in Redis: what is lost with it costs a few more deaths.
"""

import dataclasses
import json
from typing import Final

from redis import Redis

_DEATHS_AMONG_OTHERS: Final = 3  # an operator's kill, or two, must not slow anybody down
_DEATHS_ALONE: Final = 2
_KEPT_S: Final = 7 * 86_400


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """`at_once`: how many of its lines may run together, apart from other shards; None: all, among
    others. `num_deaths`: of processes while just that was tried.
    """

    at_once: int | None = None
    num_deaths: int = 0

    @property
    def is_proven(self) -> bool:
        """Whether the first open line is to blame."""
        return self.at_once == 1 and self.num_deaths >= _DEATHS_ALONE

    def after_death(self, num_lines: int) -> "Suspicion":
        """What another death means, of a process that held `num_lines` open lines of the shard."""
        died = dataclasses.replace(self, num_deaths=self.num_deaths + 1)
        if self.at_once is None:
            among_others = died.num_deaths < _DEATHS_AMONG_OTHERS
            return died if among_others else Suspicion(at_once=num_lines)
        at_once = min(self.at_once, num_lines)
        if at_once == 1:
            return dataclasses.replace(died, at_once=1)
        return Suspicion(at_once=at_once // 2)


class Deaths:
    """The records of shards, by the ids of their jobs, and what was known of those now held."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._held: dict[str, Suspicion] = {}

    def suspicion(self, job_id: str) -> Suspicion:
        found = self._redis.get(_key(job_id))
        return Suspicion(**json.loads(found)) if found else Suspicion()

    def hold(self, job_id: str, suspicion: Suspicion, *, num_lines: int) -> None:
        """From now on the end of this process counts as a death."""
        self._held[job_id] = suspicion
        self._write(job_id, suspicion.after_death(num_lines))

    def settled(self, job_id: str, *, num_lines: int) -> None:
        """A line of the shard did no harm, `num_lines` are left: of a line alone, the next is new."""
        if self._held[job_id].at_once == 1:
            self.hold(job_id, Suspicion(at_once=1), num_lines=num_lines)

    def let_go(self, job_id: str) -> None:
        """Nothing happened: the record is as it was before."""
        suspicion = self._held.pop(job_id, Suspicion())
        if suspicion == Suspicion():
            self.forget(job_id)
        else:
            self._write(job_id, suspicion)

    def forget(self, job_id: str) -> None:
        self._held.pop(job_id, None)
        self._redis.delete(_key(job_id))

    def _write(self, job_id: str, suspicion: Suspicion) -> None:
        self._redis.set(_key(job_id), json.dumps(dataclasses.asdict(suspicion)), ex=_KEPT_S)


def _key(job_id: str) -> str:
    return f"freight:deaths:{job_id}"
