"""What the block is made of: rows, their shares of a sweep, and the homes that they live in.

Knows where each row's keys and values lie; not who comes in, goes on or makes room.
"""

import dataclasses
from collections.abc import Sequence

import torch

from engine.compute.segments import Segment
from engine.config import Prompt, Scoring, TokenLogprobs
from engine.grammar import Matcher
from engine.memory.kv_cache import KVCache
from engine.memory.pages import PageRun, pages_for
from engine.planning.policy import Tier
from engine.sweep.prefixes import Prefix, PrefixTree


class Home:
    """One tier's cache and the prefixes kept in it: where rows live."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.prefixes = PrefixTree(cache)

    @property
    def tier(self) -> Tier:
        return self.cache.tier

    def can_hold(self, num_tokens: int) -> bool:
        """Whether a row of that length fits if it is alone."""
        return pages_for(num_tokens) <= self.cache.pages.num_pages

    def allocate(self, num_tokens: int) -> PageRun | None:
        """A run, if need be in place of prefixes that nobody uses."""
        while (run := self.cache.allocate(num_tokens)) is None:
            if not self.prefixes.evict():
                return None
        return run

    def extend(self, parent: Prefix | None, token_ids: Sequence[int]) -> Prefix | None:
        """A new prefix after `parent`, likewise; `parent` itself does not give way."""
        if parent is not None:
            self.prefixes.acquire(parent)
        while (prefix := self.prefixes.extend(parent, token_ids)) is None and self.prefixes.evict():
            continue
        if parent is not None:
            self.prefixes.release(parent)
        return prefix


@dataclasses.dataclass(slots=True, eq=False)
class Row:
    """One completion of a prompt on its way: (`prompt.key`, `index`) are no other row's.

    Tokens before `num_cached` have their keys and values in its home: those of `prefix` where
    several rows share them, the others in `run`.
    """

    prompt: Prompt
    limit_tokens: int  # prompt and generated together, by max_tokens and the context
    index: int = 0
    generated: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)  # if asked for
    num_read: int = 0  # of the prompt, up to where its hidden states were read
    readings: list[torch.Tensor] = dataclasses.field(default_factory=list)  # chunk by chunk
    num_cached: int = 0
    home: Home | None = None
    run: PageRun | None = None
    prefix: Prefix | None = None
    source: Prefix | None = None  # to be copied into `run` once it is computed
    may_share: bool = True
    matcher: Matcher | None = None  # where it stands in its grammar
    num_found: int = 0  # leading tokens that were there when it came in, or that others compute

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.generated)

    @property
    def num_pending(self) -> int:
        """Tokens not yet in the cache: 1 while decoding, more while a prompt is prefilled."""
        return self.num_tokens - self.num_cached

    @property
    def generates(self) -> bool:
        """Or else it ends with its prompt."""
        return self.prompt.sampling.max_tokens > 0

    @property
    def num_shared(self) -> int:
        return self.prefix.end if self.prefix else 0

    def pending_tokens(self, count: int) -> list[int]:
        prompt = self.prompt.token_ids
        at = self.num_cached
        if at >= len(prompt):
            return self.generated[at - len(prompt) : at - len(prompt) + count]
        taken = list(prompt[at : at + count])
        return taken + self.generated[: count - len(taken)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A row's part of one sweep. With `prefix` the tokens are that prefix's, on the row's behalf."""

    row: Row
    num_tokens: int
    prefix: Prefix | None = None

    @property
    def samples(self) -> bool:
        """Whether the row's last pending token is among them, and another one is to follow."""
        is_last = self.prefix is None and self.num_tokens == self.row.num_pending
        return is_last and self.row.generates

    @property
    def read_positions(self) -> range:
        """Of its tokens in the row, those whose hidden states are read: none that was before, when
        the row was computed for the first time.
        """
        row, wanted = self.row, self.row.prompt.read_positions
        if not wanted or self.prefix is not None:
            return range(0)
        first = max(wanted.start, row.num_read, row.num_cached)
        return range(first, max(first, min(wanted.stop, row.num_cached + self.num_tokens)))

    @property
    def is_scored(self) -> bool:
        """What is read is scored, or else pooled."""
        return isinstance(self.row.prompt.reading, Scoring)

    @property
    def tier(self) -> Tier:
        assert self.row.home is not None, "a row without a home takes no part"
        return self.row.home.tier

    def token_ids(self) -> list[int]:
        return (self.prefix or self.row).pending_tokens(self.num_tokens)

    def segment(self, start: int) -> Segment:
        """Its place in a micro-batch, from `start` on."""
        if self.prefix is not None:
            parent = self.prefix.parent
            return Segment(
                start=start,
                num_tokens=self.num_tokens,
                past=self.prefix.start + self.prefix.num_cached,
                slot=self.prefix.run.slot,
                prefix=parent.spans() if parent else (),
            )
        row = self.row
        assert row.run is not None, "a row without pages takes no part"
        return Segment(
            start=start,
            num_tokens=self.num_tokens,
            past=row.num_cached,
            slot=row.run.slot,
            prefix=row.prefix.spans() if row.prefix else (),
        )


def unfinished_prefix(row: Row) -> Prefix | None:
    """The first prefix of the row that is not all computed."""
    last = row.prefix or row.source
    chain = last.chain() if last else ()
    return next((prefix for prefix in chain if prefix.num_pending), None)


def take_over(row: Row, source: Prefix) -> None:
    """Copy what the row begins with to its own run."""
    assert row.home is not None
    assert row.run is not None
    for span in source.spans():
        row.home.cache.adopt(row.home.cache, span.slot, span.num_tokens, row.run.slot + span.start)
    row.home.prefixes.release(source)
    row.source, row.num_cached = None, source.end
