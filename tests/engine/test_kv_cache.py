import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.memory.kv_cache import KVCache, KVShape
from engine.memory.pages import PageAllocator, PageRun
from engine.planning.cost import KV_PAGE_TOKENS

SHAPES = [
    KVShape(num_heads=2, key_size=4, value_size=4),
    KVShape(num_heads=1, key_size=6, value_size=3),
]
PAGE_BYTES = KV_PAGE_TOKENS * sum(shape.token_bytes(torch.float32) for shape in SHAPES)


def cache_of(budget_bytes: int) -> KVCache:
    return KVCache(SHAPES, budget_bytes=budget_bytes, dtype=torch.float32)


def pages_of(run: PageRun) -> set[int]:
    return set(range(run.first_page, run.first_page + run.num_pages))


@given(
    num_pages=st.integers(1, 40),
    actions=st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 99)), max_size=60),
)
def test_runs_never_overlap_and_when_all_are_freed_one_run_of_every_page_is_free(
    num_pages: int, actions: list[tuple[bool, int, int]]
) -> None:
    pages = PageAllocator(num_pages)
    held: list[PageRun] = []
    give = (pages.allocate, pages.allocate_last)
    for is_release, wanted, index in actions:
        used = set().union(*map(pages_of, held))
        if is_release and held:
            pages.release(held.pop(index % len(held)))
        elif (run := give[index % 2](wanted)) is not None:
            assert run.num_pages == wanted
            assert pages_of(run) <= set(range(num_pages)) - used
            held.append(run)
        else:
            text = "".join("x" if page in used else "." for page in range(num_pages))
            assert "." * wanted not in text, "a run that long was free"
        assert pages.num_free_pages == num_pages - sum(run.num_pages for run in held)
    for run in held:
        pages.release(run)
    assert pages.allocate(num_pages) == PageRun(first_page=0, num_pages=num_pages)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("freed_before", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_run_released_twice_is_noticed(index: int, freed_before: tuple[int, ...]) -> None:
    pages = PageAllocator(9)
    runs = [pages.allocate(2) for _ in range(3)]
    for each in sorted({*freed_before, index}):
        run = runs[each]
        assert run is not None
        pages.release(run)
    again = runs[index]
    assert again is not None
    with pytest.raises(AssertionError, match="released twice"):
        pages.release(again)


@pytest.mark.parametrize("spare_bytes", [0, 1, PAGE_BYTES - 1])
def test_the_pools_of_all_layers_together_keep_to_the_budget_and_waste_less_than_a_page(
    spare_bytes: int,
) -> None:
    budget_bytes = 5 * PAGE_BYTES + spare_bytes
    cache = cache_of(budget_bytes)
    pools = [pool for layer in range(len(SHAPES)) for pool in cache.layer(layer)]
    held_bytes = sum(pool.nbytes for pool in pools)
    assert budget_bytes - PAGE_BYTES < held_bytes <= budget_bytes
    assert cache.num_tokens == 5 * KV_PAGE_TOKENS
    assert {pool.shape[1] for pool in pools} == {cache.num_tokens}


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(1, 1), (16, 1), (17, 2), (33, 3)])
def test_a_run_holds_the_tokens_asked_for_in_whole_pages(num_tokens: int, num_pages: int) -> None:
    run = cache_of(4 * PAGE_BYTES).allocate(num_tokens)
    assert run is not None
    assert run.num_pages == num_pages
    assert run.num_tokens == num_pages * KV_PAGE_TOKENS


def test_a_cache_that_is_full_says_so_until_something_is_released() -> None:
    cache = cache_of(2 * PAGE_BYTES)
    run = cache.allocate(2 * KV_PAGE_TOKENS)
    assert run is not None
    assert cache.allocate(1) is None
    cache.release(run)
    assert cache.allocate(1) is not None


def test_a_moved_row_finds_its_tokens_in_every_layer_and_its_old_pages_are_free() -> None:
    cache = cache_of(6 * PAGE_BYTES)
    old, neighbour = cache.allocate(20), cache.allocate(5)
    new = cache.allocate(40)
    assert old is not None
    assert neighbour is not None
    assert new is not None
    pools = [pool for layer in range(len(SHAPES)) for pool in cache.layer(layer)]
    for number, pool in enumerate(pools):
        pool.copy_(torch.arange(pool.numel()).view(pool.shape) + 10_000 * number)
    before = [pool.clone() for pool in pools]
    cache.move(old, new, 20)
    for pool, was in zip(pools, before, strict=True):
        moved = slice(new.slot, new.slot + 20)
        assert torch.equal(pool[:, moved], was[:, old.slot : old.slot + 20])
        pool[:, moved] = was[:, moved]
        assert torch.equal(pool, was), "nothing but the new run's tokens may change"
    assert cache.allocate(20) == old


@pytest.mark.parametrize("freed", ["before", "after", "both"])
def test_a_run_grows_over_its_own_pages_and_the_free_ones_beside_them(freed: str) -> None:
    cache = cache_of(6 * PAGE_BYTES)
    first, run, last = (cache.allocate(2 * KV_PAGE_TOKENS) for _ in range(3))
    assert first is not None
    assert run is not None
    assert last is not None
    for neighbour in {"before": [first], "after": [last], "both": [first, last]}[freed]:
        cache.release(neighbour)
    pools = [pool for layer in range(len(SHAPES)) for pool in cache.layer(layer)]
    for pool in pools:
        pool.copy_(torch.arange(pool.numel()).view(pool.shape))
    held = [pool[:, run.slot : run.slot + 30].clone() for pool in pools]
    num_pages = 6 if freed == "both" else 4
    assert cache.regrow(run, (num_pages + 1) * KV_PAGE_TOKENS, num_used=30) is None
    larger = cache.regrow(run, num_pages * KV_PAGE_TOKENS, num_used=30)
    assert larger is not None
    assert larger.num_pages == num_pages
    for pool, was in zip(pools, held, strict=True):
        assert torch.equal(pool[:, larger.slot : larger.slot + 30], was)
    assert cache.pages.num_free_pages == 6 - num_pages - (0 if freed == "both" else 2)


def resident_memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_pool_takes_memory_only_where_it_is_written() -> None:
    resident_bytes = resident_memory_bytes()
    shape = KVShape(num_heads=4, key_size=64, value_size=64)
    cache = KVCache([shape] * 4, budget_bytes=2 * 2**30, dtype=torch.float32)
    assert cache.num_tokens * 4 * shape.token_bytes(torch.float32) > 1.9 * 2**30
    assert resident_memory_bytes() - resident_bytes < 64 * 2**20
    assert not cache.layer(3)[1][:, -1].any()
