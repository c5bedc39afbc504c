"""The company: rows waiting and running, who takes part in the next sweep with how many tokens.

Holds the KV runs of its rows and knows when a row is finished; computes nothing.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from engine.config import Completion, FinishReason, Prompt
from engine.memory.kv_cache import KVCache, PageRun

_FIRST_ROOM_TOKENS: Final = 32
"""Generated tokens that a new row's run has room for; a run that fills up is doubled."""


@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """One prompt on its way. Tokens before `num_cached` have their keys and values in `run`."""

    prompt: Prompt
    limit_tokens: int  # prompt and generated together, by max_tokens and the context
    generated: list[int] = dataclasses.field(default_factory=list)
    num_cached: int = 0
    run: PageRun | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.generated)

    @property
    def num_pending(self) -> int:
        """Tokens not yet in the cache: 1 while decoding, more while a prompt is prefilled."""
        return self.num_tokens - self.num_cached

    def pending_tokens(self, count: int) -> list[int]:
        prompt = self.prompt.token_ids
        at = self.num_cached
        if at >= len(prompt):
            return self.generated[at - len(prompt) : at - len(prompt) + count]
        taken = list(prompt[at : at + count])
        return taken + self.generated[: count - len(taken)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A row's part of one sweep. `samples` if its last pending token is among `num_tokens`."""

    row: Row
    num_tokens: int

    @property
    def samples(self) -> bool:
        return self.num_tokens == self.row.num_pending


class Block:
    """All rows that the engine carries. Oldest rows first in every order."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_rows: int,
        on_preempt: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self._cache = cache
        self._max_rows = max_rows
        self._on_preempt = on_preempt
        self._waiting: collections.deque[Row] = collections.deque()
        self._running: list[Row] = []
        self.num_preempted = 0

    @property
    def num_rows(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def keys(self) -> Iterator[str]:
        return (row.prompt.key for row in (*self._running, *self._waiting))

    def add(self, row: Row) -> None:
        self._waiting.append(row)

    def drop(self, key: str) -> None:
        for row in [row for row in self._running if row.prompt.key == key]:
            assert row.run is not None
            self._cache.scrub(row.run)
            self._leave(row)
        self._waiting = collections.deque(row for row in self._waiting if row.prompt.key != key)

    def compose(self, *, sweep_tokens: int, max_segment_tokens: int) -> list[Share]:
        """Who takes part in the next sweep: every decoding row, then prompt tokens in order of
        arrival up to `sweep_tokens`, refilled from the waiting rows. Only younger rows make room for
        a row, so the oldest always takes part.
        """
        self._admit()
        shares: list[Share] = []
        budget_tokens = sweep_tokens
        for row in list(self._running):
            if row.run is None:
                continue  # preempted, a moment ago, for an older one
            count = row.num_pending
            if count > 1:
                count = min(count, budget_tokens, max_segment_tokens)
                budget_tokens -= count
            if count and self._make_room(row, row.num_cached + count):
                shares.append(Share(row=row, num_tokens=count))
        return shares

    def finish(
        self,
        shares: Sequence[Share],
        tokens: Iterable[int],
        *,
        is_end: Callable[[Row, int], FinishReason | None],
        complete: Callable[[Row, FinishReason], Completion],
    ) -> list[Completion]:
        """Take one sweep's outcome: `tokens` are those of the sampling shares, in order."""
        sampled = iter(tokens)
        completions = []
        for share in shares:
            row = share.row
            samples = share.samples
            row.num_cached += share.num_tokens
            if not samples:
                continue
            token = next(sampled)
            row.generated.append(token)
            reason = is_end(row, token)
            if reason is not None:
                completions.append(complete(row, reason))
                self._leave(row)
        return completions

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_rows:
            row = self._waiting[0]
            room = min(row.limit_tokens, row.num_tokens + _FIRST_ROOM_TOKENS)
            row.run = self._cache.allocate(room)
            if row.run is None:
                return
            self._running.append(self._waiting.popleft())

    def _make_room(self, row: Row, num_tokens: int) -> bool:
        """Let the row's run hold `num_tokens`, preempting younger rows if it must be; False if
        older rows hold what it needs.
        """
        assert row.run is not None
        while num_tokens > row.run.num_tokens:
            wanted = max(num_tokens, min(row.limit_tokens, 2 * row.run.num_tokens))
            larger = self._cache.allocate(wanted) or self._cache.allocate(num_tokens)
            if larger is not None:
                self._cache.move(row.run, larger, row.num_cached)
            else:
                larger = self._cache.regrow(row.run, num_tokens, num_used=row.num_cached)
            if larger is not None:
                row.run = larger
            elif self._running[-1] is row:
                self._preempt(row)
                return False
            else:
                self._preempt(self._running[-1])
        return True

    def _preempt(self, row: Row) -> None:
        """Back to the head of the waiting rows; what it generated is prefilled again later."""
        self._leave(row)
        self._on_preempt(row)
        row.num_cached = 0
        self._waiting.appendleft(row)
        self.num_preempted += 1

    def _leave(self, row: Row) -> None:
        assert row.run is not None
        self._running.remove(row)
        self._cache.release(row.run)
        row.run = None
