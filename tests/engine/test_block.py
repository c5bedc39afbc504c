import dataclasses
import zlib
from collections.abc import Sequence
from typing import Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.compute.sampling import Sampled
from engine.config import Completion, FinishReason, Prompt, Sampling
from engine.memory.kv_cache import KVCache, KVShape
from engine.planning.cost import KV_PAGE_TOKENS
from engine.sweep.block import Block
from engine.sweep.rows import Row, Share

VOCAB_SIZE: Final = 50_000


def row_of(key: str, num_prompt_tokens: int, max_tokens: int, *, like: str = "") -> Row:
    """Rows of one key, or `like` the same one, begin with the same tokens."""
    token_ids = tuple(
        zlib.crc32(f"{like or key} {at}".encode()) % VOCAB_SIZE for at in range(num_prompt_tokens)
    )
    sampling = Sampling(max_tokens=max_tokens)
    return Row(
        prompt=Prompt(key=key, token_ids=token_ids, sampling=sampling),
        limit_tokens=num_prompt_tokens + max_tokens,
    )


def next_token(tokens: Sequence[float]) -> int:
    """A model: what comes next hangs on all that came before."""
    return hash(tuple(int(token) for token in tokens)) % VOCAB_SIZE


def continuation(row: Row) -> tuple[int, ...]:
    """What `row` generates when nothing ever disturbs it."""
    tokens = list(row.prompt.token_ids)
    while len(tokens) < row.limit_tokens:
        tokens.append(next_token(tokens))
    return tuple(tokens[len(row.prompt.token_ids) :])


class Sweeper:
    """Drives a block over a real cache whose keys are the token ids themselves: the next token is
    computed from what the cache holds, so that a lost or mixed up page changes it.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        num_spill_pages: int = 0,
        max_rows: int = 8,
        sweep_tokens: int = 64,
        max_segment_tokens: int = 64,
    ) -> None:
        shape = KVShape(num_heads=1, key_size=1, value_size=1)
        budget_bytes = num_pages * KV_PAGE_TOKENS * shape.token_bytes(torch.float64)
        spill_bytes = num_spill_pages * KV_PAGE_TOKENS * shape.token_bytes(torch.float64)
        self.cache = KVCache([shape], budget_bytes=budget_bytes, dtype=torch.float64)
        caches = [self.cache]
        if num_spill_pages:  # a second home; which tier it is makes no difference to the block
            caches.append(KVCache([shape], budget_bytes=spill_bytes, dtype=torch.float64))
        self.block = Block(caches, max_rows=max_rows)
        self._max_rows = max_rows
        self._sweep_tokens = sweep_tokens
        self._max_segment_tokens = max_segment_tokens
        self.completions: list[Completion] = []

    def sweep(self) -> dict[str, int]:
        """Tokens of each row that took part."""
        shares = self.block.compose(
            sweep_tokens=self._sweep_tokens, max_segment_tokens=self._max_segment_tokens
        )
        self._require_legal(shares)
        sampled = [self._compute(share) for share in shares]
        tokens = [Sampled(token) for token in sampled if token is not None]
        self.completions += self.block.finish(shares, tokens, is_end=is_end, complete=complete)
        return {share.row.prompt.key: share.num_tokens for share in shares}

    def _require_legal(self, shares: list[Share]) -> None:
        assert self.block.num_running <= self._max_rows
        assert all(1 <= share.num_tokens <= self._max_segment_tokens for share in shares)
        is_chunk = [share.prefix is not None or share.row.num_pending > 1 for share in shares]
        chunks = [share.num_tokens for share, chunk in zip(shares, is_chunk, strict=True) if chunk]
        assert sum(chunks) <= self._sweep_tokens
        written: list[tuple[int, int]] = []
        for share in shares:
            home = share.row.home
            assert home is not None
            segment = share.segment(0)
            run = share.prefix.run if share.prefix else share.row.run
            assert run is not None
            assert run.slot <= segment.new_slots.start
            assert segment.new_slots.stop <= run.slot + run.num_tokens
            written += [(id(home), slot) for slot in segment.new_slots]
        assert len(written) == len(set(written)), "two rows write to one slot"
        assert len({share.row.prompt.key for share in shares}) == len(shares)

    def _compute(self, share: Share) -> int | None:
        assert share.row.home is not None
        [keys], _ = share.row.home.cache.layer(0)
        segment = share.segment(0)
        held = keys[:, 0]
        held[list(segment.new_slots)] = torch.tensor(share.token_ids()).double()
        seen = [
            token
            for span in segment.spans
            for token in held[span.slot : span.slot + span.num_tokens].tolist()
        ]
        return next_token(seen) if share.samples else None

    def finish(self) -> None:
        while self.block.num_rows:
            self.sweep()

    def num_kept_pages(self) -> int:
        """Pages of prefixes that were shared, and may be again."""
        return sum(home.prefixes.num_pages for home in self.block.homes)

    def require_empty(self) -> None:
        assert self.block.num_rows == 0
        for home in self.block.homes:
            free = home.cache.pages.num_free_pages
            assert free + home.prefixes.num_pages == home.cache.pages.num_pages
            while home.prefixes.evict():
                pass
            assert home.cache.pages.num_free_pages == home.cache.pages.num_pages


def is_end(row: Row, token: int) -> FinishReason | None:
    return FinishReason.LENGTH if row.num_tokens >= row.limit_tokens else None


def complete(row: Row, reason: FinishReason) -> Completion:
    return Completion(
        key=row.prompt.key,
        token_ids=tuple(row.generated),
        text="",
        finish_reason=reason,
        num_prompt_tokens=len(row.prompt.token_ids),
        num_generated=len(row.generated),
    )


def test_rows_enter_in_order_of_arrival_and_a_place_left_is_taken_at_the_next_sweep() -> None:
    sweeper = Sweeper(num_pages=40, max_rows=2)
    for key, max_tokens in [("a", 3), ("b", 1), ("c", 1), ("d", 2)]:
        sweeper.block.add(row_of(key, 4, max_tokens))
    took_part = [list(sweeper.sweep()) for _ in range(4)]
    assert took_part == [["a", "b"], ["a", "c"], ["a", "d"], ["d"]]
    assert [completion.key for completion in sweeper.completions] == ["b", "c", "a", "d"]
    sweeper.require_empty()


def test_rows_that_go_first_take_places_before_all_others_that_wait() -> None:
    sweeper = Sweeper(num_pages=40, max_rows=2)
    for key in ("a", "b", "c"):
        sweeper.block.add(row_of(key, 4, 2))
    sweeper.sweep()
    for key in ("first", "second"):
        row = row_of(key, 4, 2)
        row.prompt = dataclasses.replace(row.prompt, goes_first=True)
        sweeper.block.add(row)
    took_part = [list(sweeper.sweep()) for _ in range(4)]
    assert took_part == [["a", "b"], ["first", "second"], ["first", "second"], ["c"]]
    sweeper.finish()
    sweeper.require_empty()


def test_a_row_without_room_holds_back_those_behind_it() -> None:
    sweeper = Sweeper(num_pages=4)
    for key, num_tokens in [("a", 30), ("long", 40), ("short", 2)]:
        sweeper.block.add(row_of(key, num_tokens, 2))
    assert list(sweeper.sweep()) == ["a"]
    assert sweeper.block.num_running == 1


def test_prompts_are_prefilled_in_chunks_within_the_sweeps_budget_oldest_first() -> None:
    sweeper = Sweeper(num_pages=40, sweep_tokens=10, max_segment_tokens=8)
    for key, num_tokens in [("a", 19), ("b", 5), ("c", 3)]:
        sweeper.block.add(row_of(key, num_tokens, 4))
    assert [sweeper.sweep() for _ in range(4)] == [
        {"a": 8, "b": 2},
        {"a": 8, "b": 2},
        {"a": 3, "b": 1, "c": 3},
        {"a": 1, "b": 1, "c": 1},
    ]


def test_decoding_rows_take_part_in_every_sweep_whatever_prompts_are_waiting() -> None:
    sweeper = Sweeper(num_pages=200, max_rows=30, sweep_tokens=4, max_segment_tokens=4)
    for number in range(5):
        sweeper.block.add(row_of(f"decoding {number}", 1, 12))
    for number in range(20):
        sweeper.block.add(row_of(f"prompt {number}", 50, 12))
    for _ in range(12):
        took_part = sweeper.sweep()
        decoding = {key: count for key, count in took_part.items() if key.startswith("dec")}
        assert decoding == {f"decoding {number}": 1 for number in range(5)}
        assert sum(took_part.values()) == 5 + 4


def test_a_row_that_outgrows_its_run_moves_and_goes_on_as_if_it_had_not() -> None:
    sweeper = Sweeper(num_pages=60)
    rows = [row_of(key, 10, 200) for key in ("a", "b")]
    for row in rows:
        sweeper.block.add(row)
    sweeper.sweep()
    starts = {row.run.first_page for row in rows if row.run is not None}
    while sweeper.block.num_rows:
        assert list(sweeper.sweep()) == ["a", "b"]
        starts |= {row.run.first_page for row in rows if row.run is not None}
    assert len(starts) > 2
    assert sweeper.block.num_preempted == 0
    assert [each.token_ids for each in sweeper.completions] == [continuation(row) for row in rows]
    sweeper.require_empty()


def test_the_youngest_row_makes_room_and_later_continues_with_the_same_tokens() -> None:
    sweeper = Sweeper(num_pages=15)
    rows = [row_of("old", 4, 76), row_of("middle", 10, 140), row_of("young", 10, 140)]
    for row in rows:
        sweeper.block.add(row)
    while sweeper.block.num_preempted == 0:
        sweeper.sweep()
    young = rows[2]
    assert young.run is None
    assert (young.num_cached, young.num_pending) == (0, 10 + len(young.generated))
    assert young.generated
    assert young.pending_tokens(1000) == [*young.prompt.token_ids, *young.generated]
    assert all(row.run is not None for row in rows[:2])
    for _ in range(600):
        sweeper.sweep()
    found = {completion.key: completion.token_ids for completion in sweeper.completions}
    assert found == {row.prompt.key: continuation(row) for row in rows}
    sweeper.require_empty()


@pytest.mark.parametrize("count", range(9))
def test_pending_tokens_go_on_from_the_prompt_into_what_was_generated(count: int) -> None:
    row = row_of("a", 4, 9)
    row.generated = [101, 102, 103]
    every = [*row.prompt.token_ids, 101, 102, 103]
    for row.num_cached in range(7):
        assert row.pending_tokens(count) == every[row.num_cached :][:count]


ROWS = st.lists(
    st.tuples(st.integers(1, 70), st.integers(1, 90), st.sampled_from(("", "x", "y"))),
    min_size=1,
    max_size=10,
)


def rows_of(lengths: list[tuple[int, int, str]]) -> list[Row]:
    """Those named alike begin with the same tokens."""
    return [
        row_of(str(at), prompt, generated, like=like)
        for at, (prompt, generated, like) in enumerate(lengths)
    ]


@given(
    lengths=ROWS,
    spare_pages=st.integers(0, 12),
    num_spill_pages=st.sampled_from((0, 0, 5, 20)),
    max_rows=st.integers(1, 6),
    sweep_tokens=st.integers(1, 40),
    max_segment_tokens=st.integers(1, 40),
)
def test_every_row_finishes_with_its_own_tokens_if_the_pool_holds_the_longest(
    *,
    lengths: list[tuple[int, int, str]],
    spare_pages: int,
    num_spill_pages: int,
    max_rows: int,
    sweep_tokens: int,
    max_segment_tokens: int,
) -> None:
    longest = max(prompt + generated for prompt, generated, _ in lengths)
    sweeper = Sweeper(
        num_pages=-(-longest // KV_PAGE_TOKENS) + spare_pages,
        num_spill_pages=num_spill_pages,
        max_rows=max_rows,
        sweep_tokens=sweep_tokens,
        max_segment_tokens=max_segment_tokens,
    )
    rows = rows_of(lengths)
    for row in rows:
        sweeper.block.add(row)
    chunk_tokens = min(sweep_tokens, max_segment_tokens)
    # One by one, each prefilled again now and then: slower than that is standing still.
    totals = [prompt + generated for prompt, generated, _ in lengths]
    patience = sum(total * (4 + 2 * total // chunk_tokens) for total in totals)
    for _ in range(patience):
        if not sweeper.block.num_rows:
            break
        sweeper.sweep()
    found = {completion.key: completion.token_ids for completion in sweeper.completions}
    assert found == {row.prompt.key: continuation(row) for row in rows}
    sweeper.require_empty()


@given(lengths=ROWS, drops=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 8)), max_size=10))
def test_a_dropped_row_waiting_or_running_frees_its_pages_and_disturbs_nobody(
    lengths: list[tuple[int, int, str]], drops: list[tuple[int, int]]
) -> None:
    sweeper = Sweeper(num_pages=12, max_rows=3, sweep_tokens=20, max_segment_tokens=20)
    rows = rows_of(lengths)
    for row in rows:
        sweeper.block.add(row)
    for key, num_sweeps in drops:
        sweeper.block.drop(str(key))
        held = sum(row.run.num_pages for row in rows if row.run is not None)
        assert sweeper.cache.pages.num_free_pages == 12 - held - sweeper.num_kept_pages()
        for _ in range(num_sweeps):
            assert str(key) not in sweeper.sweep()
    for _ in range(4000):
        sweeper.sweep()
        if not sweeper.block.num_rows:
            break
    sweeper.require_empty()
    found = {completion.key: completion.token_ids for completion in sweeper.completions}
    expected = {row.prompt.key: continuation(row) for row in rows}
    assert found.items() <= expected.items()
    assert expected.keys() - found.keys() <= {str(key) for key, _ in drops}


def test_a_row_dropped_while_it_runs_leaves_its_place_to_the_next() -> None:
    sweeper = Sweeper(num_pages=40, max_rows=1)
    for key in ("a", "b"):
        sweeper.block.add(row_of(key, 4, 9))
    assert list(sweeper.sweep()) == ["a"]
    sweeper.block.drop("a")
    assert list(sweeper.sweep()) == ["b"]
    assert list(sweeper.block.keys) == ["b"]


def test_the_oldest_row_takes_part_in_every_sweep_however_tight_the_pool() -> None:
    sweeper = Sweeper(num_pages=13, max_rows=4)
    for key in ("a", "b", "c"):
        sweeper.block.add(row_of(key, 8, 200))
    for _ in range(200):
        assert "a" in sweeper.sweep()
    assert sweeper.completions[0].key == "a"


def test_rows_that_begin_alike_compute_what_they_share_once() -> None:
    sweeper = Sweeper(num_pages=60, sweep_tokens=200, max_segment_tokens=200)
    rows = [row_of(str(at), 100 + at, 5, like="job") for at in range(4)]
    for row in rows:
        sweeper.block.add(row)
    assert sweeper.sweep() == {
        "0": 96
    }  # 100 tokens alike, in whole pages; the others wait for them
    assert sweeper.sweep() == {"0": 4, "1": 5, "2": 6, "3": 7}
    sweeper.finish()
    assert sweeper.block.num_shared_tokens == 4 * 96
    found = {each.key: each.token_ids for each in sweeper.completions}
    assert found == {row.prompt.key: continuation(row) for row in rows}
    sweeper.require_empty()


def test_a_prefix_that_goes_on_otherwise_is_cut_and_both_ends_go_on() -> None:
    sweeper = Sweeper(num_pages=60, sweep_tokens=200, max_segment_tokens=200)
    same = [row_of(key, 80, 3, like="a") for key in ("a", "b")]
    for row in same:
        sweeper.block.add(row)
    sweeper.sweep()
    other = row_of("c", 90, 3, like="other")
    mixed = same[0].prompt.token_ids[:40] + other.prompt.token_ids[:50]
    late = [
        Row(
            prompt=Prompt(key=key, token_ids=mixed, sampling=Sampling(max_tokens=3)),
            limit_tokens=93,
        )
        for key in ("c", "d")
    ]
    for row in late:
        sweeper.block.add(row)
    sweeper.finish()
    found = {each.key: each.token_ids for each in sweeper.completions}
    assert found == {row.prompt.key: continuation(row) for row in (*same, *late)}
    # 64 tokens of both; of the late ones 32 found, then 80 of 90 in all shared.
    assert sweeper.block.num_shared_tokens == 64 + 64 + 80 + 80
    sweeper.require_empty()


def test_prefixes_that_nobody_uses_give_way_to_rows() -> None:
    sweeper = Sweeper(num_pages=8, sweep_tokens=200, max_segment_tokens=200)
    for key in ("a", "b"):
        sweeper.block.add(row_of(key, 70, 2, like="job"))
    sweeper.finish()
    assert sweeper.num_kept_pages() == 4
    sweeper.block.add(row_of("long", 100, 20))
    sweeper.finish()
    assert sweeper.num_kept_pages() == 0
    assert sweeper.block.num_preempted == 0
    sweeper.require_empty()


def test_a_row_that_outgrows_its_home_moves_to_the_slower_one_with_all_it_has() -> None:
    sweeper = Sweeper(num_pages=12, num_spill_pages=20)
    rows = [row_of(key, 40, 130, like="job") for key in ("a", "b")]
    for row in rows:
        sweeper.block.add(row)
    homes = set()
    while sweeper.block.num_rows:
        sweeper.sweep()
        homes |= {sweeper.block.homes.index(row.home) for row in rows if row.home}
    assert homes == {0, 1}
    assert sweeper.block.num_preempted == 0
    found = {each.key: each.token_ids for each in sweeper.completions}
    assert found == {row.prompt.key: continuation(row) for row in rows}
    sweeper.require_empty()
