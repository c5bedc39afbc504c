"""Prefixes that rows share: a tree of token runs in one tier's cache, each prefilled and kept once.

Knows which rows use a prefix only by their number. Nothing is ever written behind a prefix's end, so
sharing needs no copy: a row's own tokens go to a run of its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Optional

from engine.compute.segments import Span
from engine.memory.kv_cache import KVCache
from engine.memory.pages import PageRun
from engine.planning.cost import KV_PAGE_TOKENS

_Key = tuple[int, ...]  # the tokens of a prefix's first page


@dataclasses.dataclass(slots=True, eq=False)
class Prefix:
    """Whole pages of tokens that come after those of `parent`; `num_cached` of them are computed."""

    token_ids: tuple[int, ...]
    parent: Optional["Prefix"]
    run: PageRun
    num_cached: int = 0
    num_users: int = 0
    last_use: int = 0
    children: dict[_Key, "Prefix"] = dataclasses.field(default_factory=dict)

    @property
    def start(self) -> int:
        return self.parent.end if self.parent else 0

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_cached

    def chain(self) -> list["Prefix"]:
        """From the first tokens to this prefix."""
        return [*(self.parent.chain() if self.parent else ()), self]

    def spans(self) -> tuple[Span, ...]:
        """Where all tokens up to `end` lie."""
        return tuple(Span(each.run.slot, each.start, len(each.token_ids)) for each in self.chain())

    def pending_tokens(self, count: int) -> list[int]:
        return list(self.token_ids[self.num_cached : self.num_cached + count])


class PrefixTree:
    """All prefixes of one cache. One that nobody uses stays until its room is needed."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._roots: dict[_Key, Prefix] = {}
        self._clock = 0

    @property
    def num_pages(self) -> int:
        return sum(prefix.run.num_pages for prefix in self._all())

    def find(self, token_ids: Sequence[int]) -> Prefix | None:
        """The longest prefix of `token_ids` there is; one that goes on otherwise is cut in two."""
        found: Prefix | None = None
        children = self._roots
        rest = tuple(token_ids)
        while (child := children.get(rest[:KV_PAGE_TOKENS])) is not None:
            common = num_common(child.token_ids, rest) // KV_PAGE_TOKENS * KV_PAGE_TOKENS
            if common < len(child.token_ids):
                return self._cut(child, common)
            found, children, rest = child, child.children, rest[common:]
        return found

    def extend(self, parent: Prefix | None, token_ids: Sequence[int]) -> Prefix | None:
        """A new prefix of whole pages after `parent`; None if the cache has no room for it."""
        assert token_ids, "an empty prefix"
        assert len(token_ids) % KV_PAGE_TOKENS == 0, f"{len(token_ids)} tokens are not whole pages"
        run = self._cache.pages.allocate_last(len(token_ids) // KV_PAGE_TOKENS)
        if run is None:
            return None
        prefix = Prefix(token_ids=tuple(token_ids), parent=parent, run=run)
        assert _key(prefix) not in self._siblings(prefix), "the prefix is there already"
        self._siblings(prefix)[_key(prefix)] = prefix
        return prefix

    def acquire(self, prefix: Prefix) -> None:
        self._clock += 1
        prefix.last_use = self._clock
        prefix.num_users += 1

    def release(self, prefix: Prefix) -> None:
        assert prefix.num_users > 0, "a prefix released twice"
        prefix.num_users -= 1

    def evict(self) -> bool:
        """Give up the prefix that has been unused for longest; False if every one is in use."""
        idle = [each for each in self._all() if not each.num_users and not each.children]
        if not idle:
            return False
        oldest = min(idle, key=lambda prefix: prefix.last_use)
        del self._siblings(oldest)[_key(oldest)]
        self._cache.scrub(oldest.run)  # attention may look behind the end of whoever comes next
        self._cache.release(oldest.run)
        return True

    def _cut(self, prefix: Prefix, num_tokens: int) -> Prefix:
        """Make the first `num_tokens` a prefix of their own, before what remains of this one."""
        siblings = self._siblings(prefix)
        first, rest = prefix.run.cut(num_tokens // KV_PAGE_TOKENS)
        upper = Prefix(
            token_ids=prefix.token_ids[:num_tokens],
            parent=prefix.parent,
            run=first,
            num_cached=min(prefix.num_cached, num_tokens),
            last_use=prefix.last_use,
        )
        siblings[_key(upper)] = upper
        prefix.token_ids = prefix.token_ids[num_tokens:]
        prefix.parent = upper
        prefix.run = rest
        prefix.num_cached -= upper.num_cached
        upper.children[_key(prefix)] = prefix
        return upper

    def _siblings(self, prefix: Prefix) -> dict[_Key, Prefix]:
        return prefix.parent.children if prefix.parent else self._roots

    def _all(self) -> list[Prefix]:
        found = list(self._roots.values())
        for prefix in found:  # grows as it goes
            found += prefix.children.values()
        return found


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens the two have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _key(prefix: Prefix) -> _Key:
    return prefix.token_ids[:KV_PAGE_TOKENS]
