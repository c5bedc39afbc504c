"""How fast this machine computes, by the kernels that the engine would choose: products over rows,
decoding attention over a paged pool, stored values expanded.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Final

import torch

from engine.compute.gemm import choose_gemm, packed
from engine.compute.linear import Multiplier
from engine.compute.packing import New, Packing, write_and_attend
from engine.compute.segments import Head, Segment
from engine.memory.kv_cache import KVCache, KVShape
from engine.memory.matrix import values_of
from engine.memory.stopwatch import Rate, rate_of
from engine.planning.cost import TILE_BYTES
from engine.planning.policy import Tier

_SIDE: Final = {"cpu": 2048, "cuda": 4096}
_MATRICES_BYTES: Final = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Of all matrices that take turns: more than a cache holds, as a model's layers are."""

_KV_HEADS: Final = 4
_HEAD_SIZE: Final = 64
_CONTEXT_TOKENS: Final = 512
_ATTENDING_ROWS: Final = {"cpu": 32, "cuda": 256}


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
    gemm = choose_gemm((side, side), dtype=dtype, device=device)
    multiplier = Multiplier(gemm, device)
    count = max(2, _MATRICES_BYTES[device.type] // (side * side * dtype.itemsize))
    matrices = [torch.randn(side, side, dtype=dtype, device=device) for _ in range(count)]
    if gemm.packs:
        matrices = [packed(matrix) for matrix in matrices]
    turns = itertools.cycle(matrices)

    def measured(num_rows: int) -> GemmRate:
        values = torch.randn(num_rows, side, dtype=dtype, device=device)
        return GemmRate(
            rows=num_rows,
            rate=rate_of(
                lambda: multiplier.product(values, next(turns), None, transposed=False),
                amount=2 * num_rows * side * side,
                device=device,
                seconds=seconds,
            ),
        )

    with torch.inference_mode():
        return [measured(num_rows) for num_rows in rows]


def attention_rate(
    *, heads_per_key: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> Rate:
    """Cached bytes a second that rows with one new token each attend over."""
    num_rows = _ATTENDING_ROWS[device.type]
    shape = KVShape(num_heads=_KV_HEADS, key_size=_HEAD_SIZE, value_size=_HEAD_SIZE)
    num_bytes = num_rows * _CONTEXT_TOKENS * shape.token_bytes(dtype)
    tier = Tier.GPU if device.type == "cuda" else Tier.CPU
    cache = KVCache([shape], budget_bytes=num_bytes, dtype=dtype, tier=tier)
    for pool in cache.pools():
        pool.normal_()
    packing = _decoding(cache, num_rows)
    new = New(
        query=torch.randn(
            heads_per_key * _KV_HEADS, num_rows, _HEAD_SIZE, dtype=dtype, device=device
        ),
        key=torch.randn(_KV_HEADS, num_rows, _HEAD_SIZE, dtype=dtype, device=device),
        value=torch.randn(_KV_HEADS, num_rows, _HEAD_SIZE, dtype=dtype, device=device),
    )
    head = Head(scaling=_HEAD_SIZE**-0.5)
    with torch.inference_mode():
        return rate_of(
            lambda: write_and_attend(cache.layer(0), new, packing=packing, head=head),
            amount=num_bytes,
            device=device,
            seconds=seconds,
        )


def _decoding(cache: KVCache, num_rows: int) -> Packing:
    """Rows whose contexts lie one behind the other and fill the cache."""
    past = _CONTEXT_TOKENS - 1
    segments = [
        Segment(start=row, num_tokens=1, past=past, slot=row * _CONTEXT_TOKENS)
        for row in range(num_rows)
    ]
    slots = [slot for segment in segments for slot in segment.new_slots]
    return Packing(
        tier=cache.tier,
        segments=segments,
        slots=torch.tensor(slots, device=cache.device),
        num_slots=cache.num_tokens,
    )


def expansion_rate(
    stored_dtype: torch.dtype, *, dtype: torch.dtype, device: torch.device, seconds: float
) -> Rate:
    """Stored bytes a second that become values of `dtype`, tile by tile."""
    num_elements = TILE_BYTES // dtype.itemsize
    scratch = torch.empty(TILE_BYTES, dtype=torch.uint8, device=device)
    count = max(2, _MATRICES_BYTES[device.type] // (num_elements * stored_dtype.itemsize))
    stored = torch.randn(num_elements, device=device).to(stored_dtype)
    turns = itertools.cycle([stored.clone() for _ in range(count)])
    return rate_of(
        lambda: values_of(next(turns), dtype=dtype, scratch=scratch),
        amount=stored.nbytes,
        device=device,
        seconds=seconds,
    )
