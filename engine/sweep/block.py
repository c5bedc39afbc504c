"""The company: rows waiting and running, who takes part in the next sweep with how many tokens.

Holds the KV runs of its rows and knows when a row is finished; computes nothing.
"""

import bisect
import collections
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import torch

from engine.compute.sampling import Sampled
from engine.config import Completion, FinishReason
from engine.memory.kv_cache import KVCache
from engine.memory.pages import PageRun
from engine.planning.cost import KV_PAGE_TOKENS
from engine.sweep.prefixes import Prefix, num_common
from engine.sweep.rows import Home, Row, Share, take_over, unfinished_prefix

_FIRST_ROOM_TOKENS: Final = 32
"""Generated tokens that a new row's run has room for; a run that fills up is doubled."""

_LEAST_SHARED_TOKENS: Final = 2 * KV_PAGE_TOKENS
"""A prefix shorter than this is computed by each row for itself."""

_KEPT_ONCE_TOKENS: Final = 256
"""A prefix shorter than this is computed once, and copied to each row where room is plenty: to read
it where it lies takes a call of its own in every layer of every sweep.
"""

_NOTHING_READ: Final[Mapping[Row, torch.Tensor]] = types.MappingProxyType({})


class Block:
    """All rows that the engine carries. Oldest rows first in every order, but that of waiting rows those
    come before that go first; fastest homes first.
    """

    def __init__(
        self,
        caches: Sequence[KVCache],
        *,
        max_rows: int,
        on_preempt: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self.homes = [Home(cache) for cache in caches]
        self.max_rows = max_rows
        """May be changed between sweeps: rows above it stay until they end."""
        self._on_preempt = on_preempt
        self._waiting: collections.deque[Row] = collections.deque()
        self._running: list[Row] = []
        # Of the waiting rows, sorted: those that are alike are neighbours.
        self._prompts: list[tuple[int, ...]] = []
        self.num_preempted = 0
        self.num_shared_tokens = 0
        """Prompt tokens that rows found computed, or computed by another."""

    @property
    def num_rows(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_pages_in_use(self) -> int:
        """Of rows and of prefixes, on all tiers."""
        pools = [home.cache.pages for home in self.homes]
        return sum(pool.num_pages - pool.num_free_pages for pool in pools)

    @property
    def keys(self) -> Iterator[str]:
        return (row.prompt.key for row in (*self._running, *self._waiting))

    def add(self, row: Row) -> None:
        if row.prompt.goes_first:
            ahead = [at for at, other in enumerate(self._waiting) if other.prompt.goes_first]
            self._waiting.insert(ahead[-1] + 1 if ahead else 0, row)
        else:
            self._waiting.append(row)
        bisect.insort(self._prompts, _likeness(row))

    def drop(self, key: str) -> None:
        """Drop all rows of a prompt."""
        for row in [row for row in self._running if row.prompt.key == key]:
            assert row.run is not None
            assert row.home is not None
            row.home.cache.scrub(row.run)
            self._leave(row)
        for row in [row for row in self._waiting if row.prompt.key == key]:
            self._waiting.remove(row)
            self._forget_prompt(row)

    def compose(self, *, sweep_tokens: int, max_segment_tokens: int) -> list[Share]:
        """Who takes part in the next sweep: every decoding row, then prompt tokens in order of
        arrival up to `sweep_tokens`, refilled from the waiting rows. Only younger rows make room for
        a row, so the oldest always takes part. A row whose prefix is not all there waits for it.
        The shares of slower homes come first: theirs is the attention to hide behind the others.
        """
        self._admit()
        shares: list[Share] = []
        begun: set[Prefix] = set()
        budget_tokens = sweep_tokens
        for row in list(self._running):
            if row.run is None:
                continue  # preempted, a moment ago, for an older one
            prefix = unfinished_prefix(row)
            if prefix is not None:
                count = min(prefix.num_pending, budget_tokens, max_segment_tokens)
                if count and prefix not in begun:
                    begun.add(prefix)
                    budget_tokens -= count
                    shares.append(Share(row=row, num_tokens=count, prefix=prefix))
                continue
            if row.source is not None:
                take_over(row, row.source)
            count = row.num_pending
            if count > 1:
                count = min(count, budget_tokens, max_segment_tokens)
                budget_tokens -= count
            if count and self._make_room(row, row.num_cached + count):
                shares.append(Share(row=row, num_tokens=count))
        return self._slowest_homes_first(shares)

    def finish(
        self,
        shares: Sequence[Share],
        tokens: Iterable[Sampled],
        readings: Mapping[Row, torch.Tensor] = _NOTHING_READ,
        *,
        is_end: Callable[[Row, int], FinishReason | None],
        complete: Callable[[Row, FinishReason], Completion],
    ) -> list[Completion]:
        """Take one sweep's outcome: `tokens` are those of the sampling shares, in order, `readings`
        those of the shares that are read.
        """
        sampled = iter(tokens)
        completions = []
        for share in shares:
            row = share.row
            if share.prefix is not None:
                share.prefix.num_cached += share.num_tokens
                row.num_found -= share.num_tokens
                continue
            samples = share.samples
            if row in readings:
                row.num_read = share.read_positions.stop
                row.readings.append(readings[row])
            row.num_cached += share.num_tokens
            if not row.generates and not row.num_pending:
                completions.append(complete(row, FinishReason.LENGTH))
                self._leave(row)
            if not samples:
                continue
            token_id, logprobs = next(sampled)
            row.generated.append(token_id)
            if logprobs is not None:
                row.logprobs.append(logprobs)
            reason = is_end(row, token_id)
            if reason is not None:
                completions.append(complete(row, reason))
                self._leave(row)
        return completions

    def _slowest_homes_first(self, shares: Sequence[Share]) -> list[Share]:
        if len(self.homes) == 1:
            return list(shares)
        order = [home.tier for home in reversed(self.homes)]
        return sorted(shares, key=lambda share: order.index(share.tier))

    # -- who comes in ----------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_rows:
            row = self._waiting[0]
            if not any(self._place(row, home) for home in self.homes):
                return
            self._running.append(self._waiting.popleft())
            self._forget_prompt(row)

    def _place(self, row: Row, home: Home) -> bool:
        if not home.can_hold(row.limit_tokens):
            return False  # its growth could not be promised there
        prefix = self._prefix_of(row, home) if row.may_share else None
        if (
            prefix is not None
            and self._has_room_for_copies(row, home, prefix)
            and self._copy(row, home, prefix)
        ):
            return True
        if self._settle(row, home, prefix):
            return True
        # Where no row is, none will make room: what is free lies in pieces around the prefix.
        return prefix is not None and self._is_empty(home) and self._settle(row, home, None)

    def _has_room_for_copies(self, row: Row, home: Home, prefix: Prefix) -> bool:
        """Whether the home would hold as many rows like this one as there can be, each whole."""
        num_rows = min(self.max_rows, self.num_rows)
        is_short = prefix.end < _KEPT_ONCE_TOKENS
        return is_short and num_rows * row.limit_tokens <= home.cache.num_tokens

    def _copy(self, row: Row, home: Home, source: Prefix) -> bool:
        """Give the row room of its own for all of it, to be filled when the source is computed."""
        home.prefixes.acquire(source)
        if not self._settle(row, home, None):
            home.prefixes.release(source)
            return False
        row.source, row.num_found = source, source.end
        self.num_shared_tokens += source.end
        return True

    def _settle(self, row: Row, home: Home, prefix: Prefix | None) -> bool:
        if prefix is not None:
            home.prefixes.acquire(prefix)
        num_shared = prefix.end if prefix else 0
        room = min(row.limit_tokens, row.num_tokens + _FIRST_ROOM_TOKENS) - num_shared
        row.run = home.allocate(room)
        if row.run is None:
            if prefix is not None:
                home.prefixes.release(prefix)
            return False
        row.home, row.prefix, row.num_cached = home, prefix, num_shared
        row.num_found = num_shared
        self.num_shared_tokens += num_shared
        return True

    def _prefix_of(self, row: Row, home: Home) -> Prefix | None:
        """What the row shares with rows that came before it or are still waiting, as far as it may."""
        token_ids = row.prompt.sharable_token_ids
        prefix = home.prefixes.find(token_ids)
        start = prefix.end if prefix else 0
        end = min(self._num_common(row), len(token_ids)) // KV_PAGE_TOKENS * KV_PAGE_TOKENS
        if end - start < _LEAST_SHARED_TOKENS:
            return prefix
        return home.extend(prefix, token_ids[start:end]) or prefix

    def _num_common(self, row: Row) -> int:
        """The most leading tokens that the waiting row has in common with another waiting one."""
        at = bisect.bisect_left(self._prompts, _likeness(row))
        near = [self._prompts[i] for i in (at - 1, at + 1) if 0 <= i < len(self._prompts)]
        return max((num_common(row.prompt.token_ids, other) for other in near), default=0)

    def _forget_prompt(self, row: Row) -> None:
        del self._prompts[bisect.bisect_left(self._prompts, _likeness(row))]

    # -- who makes room --------------------------------------------------------------------

    def _make_room(self, row: Row, num_tokens: int) -> bool:
        """Let the row hold `num_tokens`, preempting younger rows of its home if it must be; False if
        older rows hold what it needs.
        """
        assert row.home is not None
        assert row.run is not None
        while num_tokens - row.num_shared > row.run.num_tokens:
            larger = self._larger_run(row, num_tokens - row.num_shared)
            if larger is not None:
                row.run = larger
            elif not self._spill(row):
                youngest = next(each for each in reversed(self._running) if each.home is row.home)
                self._preempt(youngest)
                if youngest is row:
                    return False
        return True

    def _larger_run(self, row: Row, num_own: int) -> PageRun | None:
        assert row.home is not None
        assert row.run is not None
        home, used = row.home, row.num_cached - row.num_shared
        wanted = max(num_own, min(row.limit_tokens - row.num_shared, 2 * row.run.num_tokens))
        larger = home.allocate(wanted) or home.allocate(num_own)
        if larger is None:
            return home.cache.regrow(row.run, num_own, num_used=used)
        home.cache.move(row.run, larger, used)
        return larger

    def _spill(self, row: Row) -> bool:
        """Move the row to a slower home that has room; its prefix is copied there with it."""
        assert row.home is not None
        for home in self.homes[self.homes.index(row.home) + 1 :]:
            if not home.can_hold(row.limit_tokens):
                continue
            run = home.allocate(min(row.limit_tokens, row.num_tokens + _FIRST_ROOM_TOKENS))
            if run is None:
                continue
            assert row.run is not None
            own = row.num_cached - row.num_shared
            spans = row.prefix.spans() if row.prefix else ()
            for span in spans:
                home.cache.adopt(row.home.cache, span.slot, span.num_tokens, run.slot + span.start)
            home.cache.adopt(row.home.cache, row.run.slot, own, run.slot + row.num_shared)
            self._let_go(row)
            row.home, row.run = home, run
            return True
        return False

    def _preempt(self, row: Row) -> None:
        """Back to the head of the waiting rows; what it generated is prefilled again later. One
        that was alone in its home found the room in pieces: without sharing it will fit.
        """
        home = row.home
        self._leave(row)
        row.may_share = not self._is_empty(home)
        self._on_preempt(row)
        row.num_cached = 0
        self._waiting.appendleft(row)
        bisect.insort(self._prompts, _likeness(row))
        self.num_preempted += 1

    def _is_empty(self, home: Home | None) -> bool:
        return all(row.home is not home for row in self._running)

    def _leave(self, row: Row) -> None:
        self._running.remove(row)
        self._let_go(row)

    def _let_go(self, row: Row) -> None:
        assert row.home is not None
        assert row.run is not None
        row.home.cache.release(row.run)
        for prefix in (row.prefix, row.source):
            if prefix is not None:
                row.home.prefixes.release(prefix)
        row.home, row.run, row.prefix, row.source = None, None, None, None


def _likeness(row: Row) -> tuple[int, ...]:
    """What others may find to have in common with the row: nothing, if it shares nothing."""
    return row.prompt.token_ids if row.prompt.sharable_token_ids else ()
