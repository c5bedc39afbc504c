import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
import torch
from torch import nn

from engine.compute.attend import attend, plan_attention
from engine.compute.attention import AttentionContext, attach, freight_attention
from engine.compute.gather import attend_gathered, plan_gathering
from engine.compute.lookup import suits_lookup
from engine.compute.packing import Packing
from engine.compute.routes import Here
from engine.compute.segments import Head, Segment, Span
from engine.errors import UnsupportedModelError
from engine.memory.kv_cache import KVCache, KVShape
from engine.planning.policy import Tier
from engine.timeline import Timeline

KV_HEADS: Final = 2
SIZE: Final = 8
NUM_SLOTS: Final = 512

Attend = Callable[..., torch.Tensor]

# Where shared prefixes lie, from the cache's first slot on: (first position, tokens).
PREFIXES: Final = {"job": (0, 16), "first": (16, 32), "second": (16, 16)}
CHAINS: Final = {"job": ("job",), "first": ("job", "first"), "second": ("job", "second")}

# (new tokens, tokens cached before) of each segment.
PACKINGS: Final[dict[str, list[tuple[int, int]]]] = {
    "decode": [(1, 17), (1, 3), (1, 60), (1, 0), (1, 17)],
    "like_lengths": [(1, 20), (1, 22), (1, 25), (1, 20), (1, 21), (1, 30), (1, 44)],
    "prompts": [(9, 0), (1, 0), (24, 0)],
    "later_chunks": [(5, 12), (2, 30), (11, 3)],
    "mixed": [(1, 21), (6, 0), (1, 2), (4, 33), (1, 90)],
}
SINKS: Final = torch.linspace(-1, 2, 4)
HEADS: Final[dict[str, Head]] = {
    "plain": Head(scaling=0.3),
    "window": Head(scaling=0.3, window=4),
    "wide_window": Head(scaling=0.3, window=25),
    "window_of_one": Head(scaling=0.3, window=1),
    "softcap": Head(scaling=1.5, softcap=2.0),
    "sinks": Head(scaling=0.3, sinks=SINKS),
    "all": Head(scaling=1.5, window=5, softcap=2.0, sinks=SINKS),
}


# (new tokens, tokens cached before, what is shared) of each segment.
SHARING: Final[dict[str, list[tuple[int, int, str]]]] = {
    "one_prefix": [(1, 20, "job"), (1, 33, "job"), (1, 16, "job")],
    "a_tree": [(1, 60, "first"), (1, 40, "second"), (5, 48, "first"), (3, 16, "job"), (1, 17, "")],
    "the_first_chunks": [(7, 32, "second"), (9, 48, "first"), (4, 0, "")],
}


def spans_of(shared: str) -> tuple[Span, ...]:
    """The prefixes lie one behind the other."""
    slots = {"job": 0, "first": 16, "second": 48}
    chain = CHAINS.get(shared, ())
    return tuple(Span(slots[name], *PREFIXES[name]) for name in chain)


def segments_of(packing: Sequence[tuple[int, int] | tuple[int, int, str]]) -> list[Segment]:
    """Rows lie in the cache in reverse order, with slots between them that belong to nobody."""
    segments = []
    start, end = 0, NUM_SLOTS
    for num_tokens, past, *shared in packing:
        prefix = spans_of(shared[0]) if shared else ()
        end -= past + num_tokens + 3
        segments.append(
            Segment(start=start, num_tokens=num_tokens, past=past, slot=end, prefix=prefix)
        )
        start += num_tokens
    return segments


def slots_of(segment: Segment) -> list[int]:
    """The slot of each position of its context."""
    return [
        slot for span in segment.spans for slot in range(span.slot, span.slot + span.num_tokens)
    ]


def written_out(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    segments: list[Segment],
    head: Head,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Token by token and head by head, in float64."""
    query, keys, values = query.double(), keys.double(), values.double()
    group = query.shape[0] // keys.shape[0]
    out = torch.full((query.shape[1], query.shape[0], values.shape[-1]), torch.nan).double()
    for segment in segments:
        for token in range(segment.num_tokens):
            last = segment.past + token
            first = 0 if head.window is None else max(0, last - head.window + 1)
            first = last - last % chunk_tokens if chunk_tokens is not None else first
            span = slots_of(segment)[first : last + 1]
            at = segment.start + token
            for number in range(query.shape[0]):
                scores = keys[number // group, span] @ query[number, at] * head.scaling
                if head.softcap is not None:
                    scores = head.softcap * torch.tanh(scores / head.softcap)
                weights = scores.exp()
                total = weights.sum()
                if head.sinks is not None:
                    total = total + head.sinks[number].double().exp()
                out[at, number] = weights @ values[number // group, span] / total
    return out


def random_tensors(
    segments: list[Segment], *, num_heads: int = 4, value_size: int = SIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots that no segment may see hold NaN."""
    generator = torch.Generator().manual_seed(len(segments) + num_heads)
    num_tokens = sum(segment.num_tokens for segment in segments)
    query = torch.randn(num_heads, num_tokens, SIZE, generator=generator)
    keys = torch.randn(KV_HEADS, NUM_SLOTS, SIZE, generator=generator)
    values = torch.randn(KV_HEADS, NUM_SLOTS, value_size, generator=generator)
    seen = torch.zeros(NUM_SLOTS, dtype=torch.bool)
    for segment in segments:
        seen[slots_of(segment)] = True
    keys[:, ~seen] = torch.nan
    values[:, ~seen] = torch.nan
    return query, keys, values


def attend_views(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    segments: list[Segment],
    head: Head,
) -> torch.Tensor:
    """What lies behind a row's end is finite, as the cache sees to, and must count for nothing."""
    plan = plan_attention(segments, window=head.window, dtype=query.dtype)
    keys, values = keys.nan_to_num(50.0), values.nan_to_num(1e6)
    return attend(query, keys, values, plan=plan, head=head)


def attend_copies(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    segments: list[Segment],
    head: Head,
    most_tokens: int = 2**16,
) -> torch.Tensor:
    plan = plan_gathering(segments, window=head.window, most_tokens=most_tokens, device=keys.device)
    return attend_gathered(query, keys, values, plan=plan, head=head)


def test_a_shared_prefix_costs_one_call_however_many_share_it() -> None:
    plan = plan_attention(segments_of(SHARING["a_tree"]), window=None, dtype=torch.float32)
    assert [(part.slot, part.length) for part in plan.shared] == [(0, 16), (16, 32), (48, 16)]
    found = [part.tokens.tolist() for part in plan.shared if isinstance(part.tokens, torch.Tensor)]
    assert found == [list(range(10)), [0, *range(2, 7)], [1]]


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    "packing", [*PACKINGS.values(), *SHARING.values()], ids=[*PACKINGS, *SHARING]
)
@pytest.mark.parametrize("attend_over", [attend_views, attend_copies])
def test_attention_equals_the_formula_written_out(
    attend_over: Attend, packing: list[tuple[int, int]], head: Head
) -> None:
    segments = segments_of(packing)
    tensors = random_tensors(segments)
    found = attend_over(*tensors, segments=segments, head=head)
    expected = written_out(*tensors, segments=segments, head=head)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_heads", [4, 12])
@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks"])
@pytest.mark.parametrize(
    "packing", [*PACKINGS.values(), *SHARING.values()], ids=[*PACKINGS, *SHARING]
)
def test_in_16_bits_parts_are_weighted_by_sums_that_are_not_rounded(
    packing: list[tuple[int, int]], kind: str, num_heads: int
) -> None:
    segments = segments_of(packing)
    query, keys, values = random_tensors(segments, num_heads=num_heads)
    # Sums of some tens: in 16 bits they would be off by an eighth, and the weights by as much.
    tensors = [each.to(torch.bfloat16) for each in (query + 3, keys + 3, values)]
    head = HEADS[kind]
    if head.sinks is not None:
        head = dataclasses.replace(head, sinks=torch.linspace(-1, 2, num_heads))
    found = attend_views(*tensors, segments=segments, head=head)
    expected = written_out(*tensors, segments=segments, head=head)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(12))
def test_decoding_rows_may_be_ragged_in_any_way_and_read_nothing_but_their_own(
    dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    # Few of the rows' keys fit at once where they are copied, and threads are many or one.
    monkeypatch.setattr("engine.compute.lookup._WIDENED_BYTES", draw.choice([1, 4096, 2**20]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: seed % 5 + 1)
    pasts = [draw.choice([0, 1, draw.randrange(60)]) for _ in range(draw.randint(1, 7))]
    segments = segments_of([(1, past) for past in pasts])
    num_heads = draw.choice([2, 4, 6])
    head = Head(
        scaling=0.3,
        window=draw.choice([None, 1, 20]),
        softcap=draw.choice([None, 2.0]),
        sinks=draw.choice([None, torch.linspace(-1, 2, num_heads)]),
    )
    plan = plan_attention(segments, window=head.window, dtype=dtype)
    for layer in range(2):
        tensors = random_tensors(segments, num_heads=num_heads, value_size=draw.choice([5, SIZE]))
        query, keys, values = (each.add(layer).to(dtype) for each in tensors)
        found = attend(query, keys, values, plan=plan, head=head)
        expected = written_out(query, keys, values, segments=segments, head=head)
        rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("num_heads", "dtype", "is_looked_up"),
    [
        (16, torch.float32, True),
        (18, torch.float32, False),
        (8, torch.bfloat16, True),
        (10, torch.bfloat16, False),
    ],
)
def test_rows_are_looked_up_together_unless_many_heads_read_each_key(
    num_heads: int, dtype: torch.dtype, *, is_looked_up: bool
) -> None:
    keys = torch.zeros(KV_HEADS, NUM_SLOTS, SIZE, dtype=dtype)
    assert suits_lookup(num_heads, keys) is is_looked_up


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_get_about_as_many_slots_each(
    num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    lengths = [90, 10, 80, 20, 70, 30]
    plan = plan_attention(
        segments_of([(1, length - 1) for length in lengths]), window=None, dtype=torch.float32
    )
    (lookup,) = plan.lookups(4, torch.zeros(KV_HEADS, NUM_SLOTS, SIZE))
    order = lookup.tokens.tolist()
    assert sorted(order) == list(range(6))
    each = 6 // num_threads
    shares = [sum(lengths[at] for at in order[i : i + each]) for i in range(0, 6, each)]
    assert max(shares) - min(shares) <= max(lengths) - min(lengths)


@pytest.mark.parametrize(
    ("num_heads", "value_size"), [(2, SIZE), (6, SIZE), (4, 5), (8, 12), (18, SIZE), (18, 12)]
)
@pytest.mark.parametrize("kind", ["plain", "softcap"])
@pytest.mark.parametrize("attend_over", [attend_views, attend_copies])
def test_any_number_of_query_heads_may_share_a_key_and_values_may_differ_in_size(
    attend_over: Attend, kind: str, num_heads: int, value_size: int
) -> None:
    segments = segments_of(PACKINGS["mixed"])
    tensors = random_tensors(segments, num_heads=num_heads, value_size=value_size)
    found = attend_over(*tensors, segments=segments, head=HEADS[kind])
    expected = written_out(*tensors, segments=segments, head=HEADS[kind])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_decoding_rows_of_very_different_length_are_gathered_apart_and_all_are_right(
    kind: str,
) -> None:
    segments = segments_of([(1, past) for past in (150, 0, 31, 7, 90, 30, 29)])
    tensors = random_tensors(segments)
    found = attend_copies(*tensors, segments=segments, head=HEADS[kind], most_tokens=64)
    expected = written_out(*tensors, segments=segments, head=HEADS[kind])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["softcap", "sinks", "all"])
@pytest.mark.parametrize("packing", ["decode", "prompts", "mixed"])
def test_scores_are_written_out_a_few_tokens_at_a_time(
    kind: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.compute.gather._SCORE_BYTES", 1500)
    segments = segments_of(PACKINGS[packing])
    tensors = random_tensors(segments)
    found = attend_copies(*tensors, segments=segments, head=HEADS[kind])
    expected = written_out(*tensors, segments=segments, head=HEADS[kind])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", list(PACKINGS))
def test_on_a_gpu_no_kernel_is_asked_for_a_mask_and_groups_of_heads_at_once(
    packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most have none that does both without all scores and all keys written out."""
    whole = torch.nn.functional.scaled_dot_product_attention
    asked: list[tuple[int, int, bool]] = []

    def noted(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        assert not options.get("enable_gqa")
        assert query.shape[1] == key.shape[1]
        asked.append((query.shape[1], key.shape[2], options.get("attn_mask") is not None))
        return whole(query, key, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    segments = segments_of(PACKINGS[packing])
    tensors = random_tensors(segments)
    attend_copies(*tensors, segments=segments, head=HEADS["plain"])
    assert asked
    assert all(num_heads == KV_HEADS for num_heads, _, has_mask in asked if has_mask)
    asked.clear()
    attend_copies(*tensors, segments=segments, head=HEADS["window"])
    longest = max(segment.num_tokens for segment in segments) + 3
    assert all(length <= longest for _, length, _ in asked), "no more is copied than can be seen"


class Layer(nn.Module):
    """As much of an attention module as the library hands over."""

    def __init__(self, context: AttentionContext, *, layer_idx: int = 1) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        attach(self, context)


class ChunkedConfig:
    layer_types = ("full_attention", "chunked_attention")
    attention_chunk_size = 7


class WindowedConfig:
    layer_types = ("full_attention", "sliding_attention")
    sliding_window = 4


@pytest.fixture
def cache() -> KVCache:
    shape = KVShape(num_heads=KV_HEADS, key_size=SIZE, value_size=SIZE)
    token_bytes = 2 * shape.token_bytes(torch.float32)
    return KVCache(
        [shape] * 2,
        budget_bytes=NUM_SLOTS * token_bytes,
        dtype=torch.float32,
    )


def context_of(cache: KVCache) -> AttentionContext:
    return AttentionContext({Tier.CPU: Here(cache, Timeline())})


def packed(segments: list[Segment]) -> Packing:
    slots = [slot for segment in segments for slot in segment.new_slots]
    return Packing(
        tier=Tier.CPU,
        segments=segments,
        slots=torch.tensor(slots),
        num_slots=NUM_SLOTS,
    )


def inputs(num_tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    heads = (4, KV_HEADS, KV_HEADS)
    return [torch.randn(1, number, num_tokens, SIZE, generator=generator) for number in heads]


def fill(cache: KVCache) -> None:
    for layer in range(2):
        for pool in cache.layer(layer):
            pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(layer)))


def test_only_the_new_tokens_slots_of_the_modules_own_layer_are_written(cache: KVCache) -> None:
    fill(cache)
    before = [[pool.clone() for pool in cache.layer(layer)] for layer in range(2)]
    segments = segments_of(PACKINGS["mixed"])
    context = context_of(cache)
    context.packing = packing = packed(segments)
    query, key, value = inputs(len(packing.slots))
    freight_attention(Layer(context), query, key, value, None)
    for given, pool, old in zip((key, value), cache.layer(1), before[1], strict=True):
        expected = old.index_copy(1, packing.slots, given[0])
        assert torch.equal(pool, expected)
    for pool, old in zip(cache.layer(0), before[0], strict=True):
        assert torch.equal(pool, old)
    assert context.num_calls == 1


@pytest.mark.parametrize("windowed_by", ["option", "config"])
def test_a_window_comes_from_the_call_or_from_the_configs_layer_types(
    cache: KVCache, windowed_by: str
) -> None:
    fill(cache)
    segments = segments_of(PACKINGS["mixed"])
    context = context_of(cache)
    context.packing = packing = packed(segments)
    query, key, value = inputs(len(packing.slots))
    layer = Layer(context)
    options: dict[str, Any] = {"sliding_window": 4} if windowed_by == "option" else {}
    if windowed_by == "config":
        layer.config = WindowedConfig()  # type: ignore[assignment]  # as the library's modules have
    found, weights = freight_attention(layer, query, key, value, None, scaling=0.3, **options)
    expected = written_out(query[0], *cache.layer(1), segments=segments, head=HEADS["window"])
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)
    assert weights is None


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_a_layer_of_chunks_sees_its_own_chunk_only(
    cache: KVCache, packing: list[tuple[int, int]]
) -> None:
    fill(cache)
    segments = segments_of(packing)
    context = context_of(cache)
    context.packing = packed(segments)
    query, key, value = inputs(len(context.packing.slots))
    layer = Layer(context)
    layer.config = ChunkedConfig()  # type: ignore[assignment]  # as the library's modules have
    found, _ = freight_attention(layer, query, key, value, None, scaling=0.3)
    expected = written_out(
        query[0], *cache.layer(1), segments=segments, head=HEADS["plain"], chunk_tokens=7
    )
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_query_tempered_by_its_place_is_tempered_by_its_position(cache: KVCache) -> None:
    fill(cache)
    segments = segments_of(PACKINGS["mixed"])
    context = context_of(cache)
    context.packing = packed(segments)
    query, key, value = inputs(len(context.packing.slots))
    layer = Layer(context)
    layer.attn_temperature_tuning = True  # type: ignore[assignment]  # as Llama 4's modules have
    layer.use_rope, layer.floor_scale, layer.attn_scale = False, 4, 0.5  # type: ignore[assignment]

    def scales(at: torch.Tensor) -> torch.Tensor:
        return (1 + 0.5 * torch.log1p(torch.floor((at + 1.0) / 4)))[:, None]

    positions = torch.cat([torch.arange(each.past, each.context) for each in segments])
    given = query * scales(torch.arange(len(positions)))
    found, _ = freight_attention(layer, given, key, value, None, scaling=0.3)
    expected = written_out(
        query[0] * scales(positions), *cache.layer(1), segments=segments, head=HEADS["plain"]
    )
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_keys_are_scaled_by_the_root_of_their_size_when_the_model_names_no_scale(
    cache: KVCache,
) -> None:
    fill(cache)
    segments = segments_of(PACKINGS["mixed"])
    context = context_of(cache)
    context.packing = packed(segments)
    query, key, value = inputs(len(context.packing.slots))
    found, _ = freight_attention(Layer(context), query, key, value, None)
    head = Head(scaling=SIZE**-0.5)
    expected = written_out(query[0], *cache.layer(1), segments=segments, head=head)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["attention_mask", "position_bias"])
def test_a_mask_or_bias_of_the_models_own_is_refused(cache: KVCache, option: str) -> None:
    context = context_of(cache)
    context.packing = packed(segments_of([(3, 0)]))
    query, key, value = inputs(3)
    mask = torch.zeros(1, 1, 3, 3) if option == "attention_mask" else None
    bias = torch.zeros(1, 4, 3, 3) if option == "position_bias" else None
    with pytest.raises(UnsupportedModelError, match="Layer attends with a mask or bias"):
        freight_attention(Layer(context), query, key, value, mask, position_bias=bias)


@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("shape", [(1, 3, 3, SIZE), (1, KV_HEADS, 3, SIZE + 1)])
def test_heads_unlike_the_configs_promise_are_refused_with_both_shapes(
    cache: KVCache, which: str, shape: tuple[int, ...]
) -> None:
    fill(cache)
    before = [pool.clone() for pool in cache.layer(1)]
    context = context_of(cache)
    context.packing = packed(segments_of([(3, 0)]))
    query, key, value = inputs(3)
    given = {"key": key, "value": value} | {which: torch.zeros(shape)}
    message = f"attends over {shape[1]} heads of {shape[3]}, its config promises 2 of 8"
    with pytest.raises(UnsupportedModelError, match=message):
        freight_attention(Layer(context), query, given["key"], given["value"], None)
    assert all(torch.equal(*pair) for pair in zip(cache.layer(1), before, strict=True))
