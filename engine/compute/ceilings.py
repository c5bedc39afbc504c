"""How fast each link and unit of this machine is, measured in tens of milliseconds each."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from engine.compute.gemm import products_with
from engine.errors import PackError
from engine.memory.manifest import Pack
from engine.memory.placement import split_groups
from engine.memory.shapes import largest_matrix
from engine.memory.stopwatch import timed_s
from engine.memory.tiers import PAGE_BYTES, DirectReader, HostArena, HostBuffer
from engine.planning.ceilings import Ceilings
from engine.planning.policy import Policy, Tier

_READ_BYTES: Final = 32 * 2**20
_COPY_BYTES: Final = 32 * 2**20
_SCANNED_BYTES: Final = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""More than a cache holds."""

_MAX_MATRIX_ELEMENTS: Final = {"cpu": 2**22, "cuda": 2**25}
_REPEATS: Final = 3


def ceilings_of(pack: Pack, policy: Policy) -> Ceilings:
    """Of the links and units that a sweep under `policy` uses. Raises PackError."""
    splits = [*policy.layer_splits, *([policy.head_split] if policy.head_split else ())]
    layers, _ = split_groups(pack.groups)
    reads_disk = any(split.disk_bytes for split in splits)
    devices = {tier: torch.device("cuda" if tier is Tier.GPU else "cpu") for tier in Tier}
    try:
        return measure_ceilings(
            streamed_file=layers[0].path if reads_disk else None,
            matrix=largest_matrix(pack.groups),
            num_rows=policy.micro_batch_tokens,
            dtype=getattr(torch, policy.compute_dtype),
            device=devices[policy.compute],
            kv_device=devices[next(tier for tier in Tier if policy.kv[tier])],
        )
    except OSError as error:
        raise PackError(f"the weights cannot be read: {error}") from error


def measure_ceilings(
    *,
    streamed_file: Path | None,
    matrix: tuple[int, int],
    num_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_device: torch.device,
) -> Ceilings:
    """Once a process for each file and shape: `num_rows` of a micro-batch by a `matrix` (out, in).

    To be done while nothing else is in memory or under way: at most 64 MiB are taken of a CPU's
    memory, 256 of a GPU's, and given back. `streamed_file` None: nothing is read from disk in a sweep. Raises OSError.
    """
    num_outputs, num_inputs = matrix
    num_outputs = min(num_outputs, max(1, _MAX_MATRIX_ELEMENTS[device.type] // num_inputs))
    return Ceilings(
        gemm_flops_per_s=_gemm_flops_per_s(num_rows, num_outputs, num_inputs, dtype, device),
        memory_bytes_per_s=_memory_bytes_per_s(kv_device),
        disk_read_bytes_per_s=_disk_bytes_per_s(streamed_file) if streamed_file else None,
        to_gpu_bytes_per_s=_copy_bytes_per_s(device) if device.type == "cuda" else None,
    )


@functools.cache
def _gemm_flops_per_s(  # noqa: PLR0917  # a cache takes one by one what it tells calls apart by
    num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype, device: torch.device
) -> float:
    values = torch.randn(num_rows, num_inputs, dtype=dtype, device=device)
    weights = torch.randn(num_outputs, num_inputs, dtype=dtype, device=device)
    flops = 2 * num_rows * num_outputs * num_inputs
    with torch.inference_mode():
        products = products_with(weights).values()
        return flops / min(
            _best_s(functools.partial(product, values), device) for product in products
        )


@functools.cache
def _memory_bytes_per_s(device: torch.device) -> float:
    num_bytes = _SCANNED_BYTES[device.type]
    scanned = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / _best_s(scanned.sum, device)


@functools.cache
def _disk_bytes_per_s(path: Path) -> float:
    """Direct reads at several places of the very file: none that a cache can have kept."""
    file_bytes = path.stat().st_size
    num_bytes = min(_READ_BYTES, file_bytes)
    last = (file_bytes - num_bytes) // PAGE_BYTES * PAGE_BYTES
    buffer = HostBuffer(num_bytes + 2 * PAGE_BYTES)
    best_s = float("inf")
    with DirectReader(path) as reader:
        for place in range(_REPEATS):
            offset = place * last // (_REPEATS - 1) // PAGE_BYTES * PAGE_BYTES
            started_s = time.perf_counter()
            reader.read(buffer, offset_bytes=offset, num_bytes=num_bytes)
            best_s = min(best_s, time.perf_counter() - started_s)
    return num_bytes / best_s


@functools.cache
def _copy_bytes_per_s(device: torch.device) -> float:
    arena = HostArena(_COPY_BYTES, pinned=True)
    source = arena.take(_COPY_BYTES).bytes
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    best_s = _best_s(lambda: target.copy_(source, non_blocking=True), device)
    arena.close()
    return _COPY_BYTES / best_s


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes in the fastest trial, the first not counted."""
    timed_s(run, device)
    return min(timed_s(run, device) for _ in range(_REPEATS))
