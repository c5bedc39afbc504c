"""What a CPU that computes loses beside what other threads bring: weights read from disk, and keys and
values fetched from it. Measured in pairs, each of which others' load meets alike.
"""

import concurrent.futures
import contextlib
import itertools
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from engine.compute.rates import products_of
from engine.memory.copying import copy_by_one_thread
from engine.memory.kv_cache import KVCache, KVShape
from engine.memory.links import Reading, disk_reader
from engine.memory.stopwatch import rate_of
from engine.planning.policy import Tier

_CPU: Final = torch.device("cpu")
_SIDE: Final = 1024
_ROWS: Final = 96
_NUM_PAIRS: Final = 9

_KV_SHAPE: Final = KVShape(num_heads=8, key_size=64, value_size=64)
_KV_LAYERS: Final = 4
_KV_ROWS: Final = 32
_KV_TOKENS: Final = 64
"""Of each row, as many as a row of a small job has."""


def lost_beside_reads(
    folder: Path, *, request_bytes: int, file_bytes: int, seconds: float
) -> float:
    """Of float32 products' rate, the share that is lost while the disk is read as weights are. Raises
    OSError.
    """
    with disk_reader(folder, request_bytes=request_bytes, file_bytes=file_bytes) as reading:
        return _lost_beside(reading, seconds)


def lost_beside_fetches(folder: Path, *, seconds: float) -> float:
    """The same while rows' keys and values are copied from the spill file, one row after the other as
    `engine/compute/fetched.py` does. Raises OSError.
    """
    cache = KVCache(
        [_KV_SHAPE] * _KV_LAYERS,
        budget_bytes=_KV_LAYERS * _KV_ROWS * _KV_TOKENS * _KV_SHAPE.token_bytes(torch.float32),
        dtype=torch.float32,
        tier=Tier.DISK,
        spill_dir=folder,
    )
    with contextlib.closing(cache), concurrent.futures.ThreadPoolExecutor(1) as pool:
        for each in cache.pools():
            each.fill_(1)

        @contextlib.contextmanager
        def fetching() -> Iterator[None]:
            is_over = threading.Event()
            job = pool.submit(_fetch, cache, is_over)
            try:
                yield
            finally:
                is_over.set()
            job.result()

        return _lost_beside(fetching, seconds)


def _fetch(cache: KVCache, is_over: threading.Event) -> None:
    """Every row's of one layer, then the next layer's, until it is over."""
    rooms = [torch.empty_like(pool) for pool in cache.layer(0)]
    for layer in itertools.cycle(range(_KV_LAYERS)):
        pools = cache.layer(layer)
        for row in range(_KV_ROWS):
            cache.read_ahead(layer, row * _KV_TOKENS, _KV_TOKENS)
        for pool, room in zip(pools, rooms, strict=True):
            for first in range(0, _KV_ROWS * _KV_TOKENS, _KV_TOKENS):
                if is_over.is_set():
                    return
                span = slice(first, first + _KV_TOKENS)
                copy_by_one_thread(room[:, span], pool[:, span])


def _lost_beside(reading: Reading, seconds: float) -> float:
    """Of the middle pair's rate."""
    run = products_of(_SIDE, dtype=torch.float32, device=_CPU)(_ROWS)

    def per_s() -> float:
        return rate_of(run, amount=1.0, device=_CPU, seconds=seconds / 2 / _NUM_PAIRS).per_s

    left = []
    for _ in range(_NUM_PAIRS):
        alone = per_s()
        with reading():
            left.append(per_s() / alone)
    return max(0.0, 1.0 - statistics.median(left))
