"""How fast this machine computes, by the kernels that the engine would choose: products over rows,
decoding attention over a paged pool, stored values expanded.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Final

import torch

from engine.compute.gemm import choose_gemm, packed
from engine.compute.linear import Multiplier
from engine.compute.packing import New, Packing, write_and_attend
from engine.compute.segments import Head, Segment
from engine.memory.kv_cache import KVCache, KVShape
from engine.memory.stopwatch import Rate, rate_of
from engine.planning.policy import Tier

_SIDE: Final = {"cpu": 2048, "cuda": 4096}
_MATRICES_BYTES: Final = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Of all matrices that take turns, or layers' keys and values: more than a cache holds."""

_KV_HEADS: Final = 4
_HEAD_SIZE: Final = 64
_KV_SHAPE: Final = KVShape(num_heads=_KV_HEADS, key_size=_HEAD_SIZE, value_size=_HEAD_SIZE)
_CONTEXT_TOKENS: Final = 512
_ATTENDING_ROWS: Final = {"cpu": 32, "cuda": 256}
_NUM_PROMPTS: Final = 4
_TINY_PROMPT_TOKENS: Final = 4
_PROMPT_HEADS_PER_KEY: Final = 2
_FEW_ROWS: Final = 32
_SMALL_SIDE: Final = 512
_TINY_SIDE: Final = 32
_MOST_MATRICES: Final = 256
_MOST_LAYERS: Final = 64
_NUM_TURNS: Final = 3
_LEAST_SHARE: Final = 0.02
"""Of what is timed: a smaller difference is not told from none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GemmRate:
    """FLOP/s of `rows` rows by one matrix after the other."""

    rows: int
    rate: Rate


def gemm_rates(
    rows: Sequence[int], *, dtype: torch.dtype, device: torch.device, seconds: float
) -> list[GemmRate]:
    """By matrices in compute dtype that stay where they are, laid out as the engine lays them."""
    side = _SIDE[device.type]
    product = products_of(side, dtype=dtype, device=device)
    return [
        GemmRate(
            rows=num_rows,
            rate=rate_of(
                product(num_rows),
                amount=2 * num_rows * side * side,
                device=device,
                seconds=seconds,
            ),
        )
        for num_rows in rows
    ]


def attention_rate(
    *, heads_per_key: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> Rate:
    """Cached bytes a second that rows with one new token each attend over."""
    num_rows = _ATTENDING_ROWS[device.type]
    segments = [
        Segment(start=row, num_tokens=1, past=_CONTEXT_TOKENS - 1, slot=row * _CONTEXT_TOKENS)
        for row in range(num_rows)
    ]
    num_bytes = num_rows * _CONTEXT_TOKENS * _KV_SHAPE.token_bytes(dtype)
    run = _attending(segments, heads_per_key=heads_per_key, dtype=dtype, device=device)
    return rate_of(run, amount=num_bytes, device=device, seconds=seconds)


def _prompts(num_tokens: int) -> list[Segment]:
    starts = range(0, _NUM_PROMPTS * num_tokens, num_tokens)
    return [Segment(start=at, num_tokens=num_tokens, past=0, slot=at) for at in starts]


def _attending(
    segments: Sequence[Segment], *, heads_per_key: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """Over layers in turn, each of which their contexts fill, lying one behind the other."""
    num_bytes = sum(each.context for each in segments) * _KV_SHAPE.token_bytes(dtype)
    num_layers = min(max(2, _MATRICES_BYTES[device.type] // num_bytes), _MOST_LAYERS)
    tier = Tier.GPU if device.type == "cuda" else Tier.CPU
    cache = KVCache(
        [_KV_SHAPE] * num_layers, budget_bytes=num_layers * num_bytes, dtype=dtype, tier=tier
    )
    for pool in cache.pools():
        pool.fill_(1)
    packing = _packing(cache, segments)
    num_tokens = sum(each.num_tokens for each in segments)

    def values(num_heads: int) -> torch.Tensor:
        return torch.randn(num_heads, num_tokens, _HEAD_SIZE, dtype=dtype, device=device)

    new = New(
        query=values(heads_per_key * _KV_HEADS), key=values(_KV_HEADS), value=values(_KV_HEADS)
    )
    head = Head(scaling=_HEAD_SIZE**-0.5)
    turns = itertools.cycle(range(num_layers))

    def run() -> object:
        with torch.inference_mode():
            return write_and_attend(cache.layer(next(turns)), new, packing=packing, head=head)

    return run


def _packing(cache: KVCache, segments: Sequence[Segment]) -> Packing:
    slots = [slot for segment in segments for slot in segment.new_slots]
    return Packing(
        tier=cache.tier,
        segments=segments,
        slots=torch.tensor(slots, device=cache.device),
        num_slots=cache.num_tokens,
    )


def prompt_rate(
    num_tokens: int, *, dtype: torch.dtype, device: torch.device, seconds: float
) -> Rate:
    """FLOP/s of attention within prompts of so many tokens, beside what tiny ones take."""
    many, tiny = (
        _attending(_prompts(count), heads_per_key=_PROMPT_HEADS_PER_KEY, dtype=dtype, device=device)
        for count in (num_tokens, _TINY_PROMPT_TOKENS)
    )
    pairs = [count * (count + 1) // 2 for count in (num_tokens, _TINY_PROMPT_TOKENS)]
    size = _PROMPT_HEADS_PER_KEY * _KV_HEADS * 2 * _HEAD_SIZE
    amount = 2 * size * _NUM_PROMPTS * (pairs[0] - pairs[1])
    return rate_of_more(many, tiny, amount=amount, device=device, seconds=seconds)


def product_overhead_s(*, seconds: float) -> float:
    """Of a float32 product on a CPU, beside its arithmetic and beside what a tiny one takes."""
    device = torch.device("cpu")
    runs = [
        products_of(side, dtype=torch.float32, device=device)(_FEW_ROWS)
        for side in (_SMALL_SIDE, 2 * _SMALL_SIDE, _TINY_SIDE)
    ]
    small, large, tiny = (
        1 / statistics.median(rate.per_s for rate in its)
        for its in _in_turns(runs, device, seconds)
    )
    # The larger one has four times as much to do.
    return max(0.0, small - (large - small) / 3 - tiny)


def expansion_rates(
    rows: Sequence[int],
    stored_dtype: torch.dtype,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> list[GemmRate]:
    """Stored bytes a second that products of so many rows make ready for themselves: turned to `dtype`
    tile by tile and, on a CPU, laid out as the kernel computes from. Of products with weights as they
    are stored, less those with weights that are ready.
    """
    side = _SIDE[device.type] // 2
    as_stored, ready = (
        products_of(side, dtype=dtype, device=device, stored=stored)
        for stored in (stored_dtype, None)
    )
    return [
        GemmRate(
            rows=num_rows,
            rate=rate_of_more(
                as_stored(num_rows),
                ready(num_rows),
                amount=side * side * stored_dtype.itemsize,
                device=device,
                seconds=seconds,
            ),
        )
        for num_rows in rows
    ]


def products_of(
    side: int, *, dtype: torch.dtype, device: torch.device, stored: torch.dtype | None = None
) -> Callable[[int], Callable[[], object]]:
    """Of so many rows, by one square matrix after the other: as it is stored, or ready, laid out as the
    engine lays out what stays.
    """
    gemm = choose_gemm((side, side), dtype=dtype, device=device)
    multiplier = Multiplier(gemm, device)
    itemsize = (stored or dtype).itemsize
    count = max(2, _MATRICES_BYTES[device.type] // (side * side * itemsize))
    # Of a tiny one there would be too many to make.
    matrix = torch.ones(side, side, dtype=stored or dtype, device=device)
    if stored is None and gemm.packs:
        matrix = packed(matrix)
    matrices = [matrix.clone() for _ in range(min(count, _MOST_MATRICES))]
    turns = itertools.cycle(matrices)

    def product(num_rows: int) -> Callable[[], object]:
        values = torch.randn(num_rows, side, dtype=dtype, device=device)

        def run() -> object:
            with torch.inference_mode():
                return multiplier.product(values, next(turns), None, transposed=False)

        return run

    return product


def rate_of_more(
    more: Callable[[], object],
    less: Callable[[], object],
    *,
    amount: float,
    device: torch.device,
    seconds: float,
) -> Rate:
    """`amount` over what the one takes longer than the other. They take turns, so that others' load
    meets them alike; a difference that their trials hide is as small as can be told.
    """
    rates = _in_turns((more, less), device, seconds)
    more_s, less_s = (1 / statistics.median(rate.per_s for rate in its) for its in rates)
    return Rate(
        per_s=amount / max(more_s - less_s, _LEAST_SHARE * more_s),
        spread=max(rate.spread for rate in rates[0]),
    )


def _in_turns(
    runs: Sequence[Callable[[], object]], device: torch.device, seconds: float
) -> list[list[Rate]]:
    """Calls a second of each, several times."""
    rates: list[list[Rate]] = [[] for _ in runs]
    for _ in range(_NUM_TURNS):
        for run, its in zip(runs, rates, strict=True):
            turn_s = seconds / len(runs) / _NUM_TURNS
            its.append(rate_of(run, amount=1.0, device=device, seconds=turn_s))
    return rates
