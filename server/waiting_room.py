"""Where requests outside batches wait: recorded as riders, rung for, looked for, answered or let go.

One task does it for all of a server's riders, however many wait: what has come and gone since the
last time is written together, and one query finds all answers. The ledger is asked, Redis is not.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Final

import structlog
from starlette.concurrency import run_in_threadpool

from jobs.batch import Endpoint
from jobs.errors import RateLimitError, RequestError
from jobs.ledger.ledger import Ledger
from jobs.rider import Rider, RiderAnswer, new_party_id, new_rider_id
from server.bell import Bell

_SHORTEST_S: Final = 0.01
_LONGEST_S: Final = 0.25
_GROWTH: Final = 1.2  # of the pause between looks: an answer is found a fifth late at most
_RETRY_AFTER_S: Final = 5


class StoppingError(RequestError):
    """The server is about to stop; when it is there again there will be an answer."""


class WaitOverError(RequestError):
    """No answer within the time that a rider waits."""


class WaitingRoom:
    """Open within the event loop that its riders are of. What is left at the end is removed."""

    def __init__(
        self, ledger: Ledger, bell: Bell, *, wait_s: float, max_riders: int, party_riders: int
    ) -> None:
        """`party_riders` are rung for together at most."""
        self._ledger = ledger
        self._bell = bell
        self._wait_s = wait_s
        self._max_riders = max_riders
        self._party_riders = party_riders
        self._server_id = f"server_{secrets.token_hex(16)}"
        self._num_places = 0
        self._is_closing = False
        self._waiting: dict[str, asyncio.Future[RiderAnswer]] = {}
        self._arrived: list[Rider] = []
        self._left: list[str] = []
        self._news = asyncio.Event()

    @contextlib.asynccontextmanager
    async def opened(self) -> "AsyncIterator[WaitingRoom]":
        task = asyncio.create_task(self._attend(), name="riders")
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait([task])
            await run_in_threadpool(self._ledger.riders.remove_all_of, self._server_id)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places, from before a body is read. Raises RateLimitError, StoppingError."""
        if self._is_closing:
            raise _stopping()
        if self._num_places >= self._max_riders:
            raise RateLimitError(
                f"{self._num_places} requests wait for their answers already. The limit is "
                f"{self._max_riders}. Try again later, or put the requests into a batch.",
                code="rate_limit_exceeded",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._num_places += 1
        try:
            yield
        finally:
            self._num_places -= 1

    def board(self, endpoint: Endpoint, model: str, body: Mapping[str, Any]) -> str:
        """Send it on its way; the rider's id. What it asks is not kept here: many may wait."""
        rider = Rider(
            id=new_rider_id(),
            endpoint=endpoint,
            model=model,
            body=body,
            expires_at=time.time() + self._wait_s,
        )
        self._waiting[rider.id] = asyncio.get_running_loop().create_future()
        self._arrived.append(rider)
        self._news.set()
        return rider.id

    async def answer_to(self, rider_id: str) -> RiderAnswer:
        """Raises WaitOverError, StoppingError, or what the ledger raised."""
        try:
            async with asyncio.timeout(self._wait_s):
                return await self._waiting[rider_id]
        except TimeoutError:
            raise WaitOverError(
                f"The request was not answered within {self._wait_s:g} s and has been given up. "
                "What takes longer is better asked in a batch.",
                code="request_timeout",
            ) from None

    def leave(self, rider_id: str) -> None:
        """Nobody waits for it any more, answered or not."""
        answer = self._waiting.pop(rider_id)
        self._left.append(rider_id)
        if answer.cancelled() or not answer.done():
            self._news.set()  # its rows are in others' way

    def dismiss(self) -> None:
        """Before the server stops: who waits, or comes now, is told to come again."""
        self._is_closing = True
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(_stopping())

    async def _attend(self) -> None:
        pause_s = _SHORTEST_S
        while True:
            is_idle = not self._waiting and not self._left
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if is_idle else pause_s):
                    await self._news.wait()
            self._news.clear()
            has_moved = await self._exchange()
            pause_s = _SHORTEST_S if has_moved else min(_GROWTH * pause_s, _LONGEST_S)

    async def _exchange(self) -> bool:
        """Tell the ledger who came and left, and hand out its answers; whether there was anything."""
        left, self._left = self._left, []
        arrived, self._arrived = self._arrived, []
        parties = self._parties([rider for rider in arrived if rider.id in self._waiting])
        try:
            answers = await run_in_threadpool(self._exchange_with_ledger, parties, left)
        except Exception as error:  # noqa: BLE001 - without this task nobody is answered
            structlog.get_logger().warning("riders cannot be exchanged", error=repr(error))
            self._left += left
            for rider in arrived:
                self._refuse(rider.id, error)
            return False
        for answer in answers:
            waiting = self._waiting.get(answer.rider_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
        return bool(arrived or answers)

    def _exchange_with_ledger(
        self, parties: Mapping[str, Sequence[Rider]], left: Sequence[str]
    ) -> list[RiderAnswer]:
        answers = self._ledger.riders.exchange(self._server_id, arrived=parties, left=left)
        for party_id in parties:
            self._bell.riders(party_id)
        return answers

    def _parties(self, riders: Sequence[Rider]) -> dict[str, Sequence[Rider]]:
        starts = range(0, len(riders), self._party_riders)
        return {new_party_id(): riders[at : at + self._party_riders] for at in starts}

    def _refuse(self, rider_id: str, error: Exception) -> None:
        waiting = self._waiting.get(rider_id)
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)


def _stopping() -> StoppingError:
    return StoppingError("The server is about to stop. Try again in a moment.")
