"""What the program is solved for, one after the other: block rows, chunks, micro-batches, where rows
that live elsewhere attend, and how layers are fetched. Places nothing.
"""

import dataclasses
import enum
import math
from collections.abc import Iterator
from typing import Final

from engine.config import Budgets
from engine.planning.cost import KV_PAGE_TOKENS, held_units
from engine.planning.job import simulate
from engine.planning.load import Load, kept_tokens, load_of, longest_row_tokens, steady_load
from engine.planning.planners.base import Situation, Wishes
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape
from engine.planning.units import UNIT_BYTES, UNIT_SLOTS
from engine.planning.workload import Workload

_ROWS: Final = tuple(sorted({round(2 ** (step / 2)) for step in range(29)}))
"""1 to 16384, by half powers of two."""

_CHUNK_SLACK: Final = 1.25
"""Prompt tokens that a sweep may carry over those of the steady state: for rows' unequal lengths."""

_LARGER_CHUNKS: Final = (2, 4, 8)
"""Times a chunk of the steady state: rows of a short job start to decode together, and fewer sweeps read
what streams.
"""

_LEAST_SWEEP_TOKENS: Final = 64
_LEAST_CHUNK_TOKENS: Final = 16
_STEADY_BLOCKS: Final = 4
"""A job of so many times the block's rows is steady most of the time."""

_AHEAD: Final = 2
"""Slots beside those that hold a layer: one is filled ahead, one is spare."""

_FETCHED_IN: Final = 8
"""Micro-batches at least, where keys and values are fetched: one is fetched while one attends."""

_MICRO_BATCHES: Final = (256, 1024, 4096, 16384)


class Away(enum.StrEnum):
    """What becomes of rows that do not live on the compute tier."""

    NONE = "all live on the compute tier"
    BESIDE = "attend beside their keys and values"
    FETCHED = "keys and values are fetched"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """`base` has everything on the compute tier and no KV: what is to be placed is open."""

    base: Policy
    away: Away
    load: Load
    kept_tokens: int
    """Of whole pages that the block's rows take in steady state; at least the longest row's."""


def candidates(shape: ModelShape, budgets: Budgets, wishes: Wishes) -> Iterator[Candidate]:
    """In no order of merit. Raises nothing: what does not fit is found later."""
    situation = wishes.situation
    assert situation is not None, "a program is of a machine and a workload"
    for rows in _row_counts(situation, wishes):
        sweep_tokens = wishes.sweep_tokens or _chunk(situation.workload, rows)
        yield from _of_block(shape, budgets, situation, rows=rows, sweep_tokens=sweep_tokens)


def with_larger_chunks(
    shape: ModelShape, budgets: Budgets, wishes: Wishes, *, block_rows: int
) -> Iterator[Candidate]:
    """Of a job that is short for so many rows, up to all of a block's prompts in one sweep. And with
    the next larger number of rows, which may be worth it with them alone.
    """
    situation = wishes.situation
    assert situation is not None, "a program is of a machine and a workload"
    if wishes.sweep_tokens is not None:
        return
    more = [rows for rows in _row_counts(situation, wishes) if rows > block_rows]
    for rows in (block_rows, *more[:1]):
        for sweep_tokens in _larger_chunks(situation.workload, rows):
            yield from _of_block(shape, budgets, situation, rows=rows, sweep_tokens=sweep_tokens)


def _of_block(
    shape: ModelShape, budgets: Budgets, situation: Situation, *, rows: int, sweep_tokens: int
) -> Iterator[Candidate]:
    compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU
    # With a CPU to compute nothing is beside; with a GPU no row need live away to attend beside.
    ways = (Away.BESIDE if compute is Tier.GPU else Away.NONE, Away.FETCHED)
    for micro_batch in _micro_batches(rows + sweep_tokens):
        base = _base(
            shape, compute, rows=rows, sweep_tokens=sweep_tokens, micro_batch_tokens=micro_batch
        )
        for away in ways:
            yield candidate(shape, situation, base, away)


class Loads:
    """What sweeps a candidate is to be placed for. A job is played through once for each block and
    chunk, however many candidates share them.
    """

    def __init__(self, situation: Situation) -> None:
        self._workload = situation.workload
        self._means: dict[tuple[int, int], Load] = {}

    def of(self, steady: Candidate) -> list[Candidate]:
        """The candidate, and of a job that is short for its block the same with the mean sweep to be
        placed for.
        """
        mean = self.mean(steady.base)
        return [steady] if mean is None else [steady, dataclasses.replace(steady, load=mean)]

    def mean(self, policy: Policy) -> Load | None:
        """Of a job that is short for the policy's block, the mean sweep. It is not the steady one: fewer
        rows decode while the block fills and drains.
        """
        if not _is_short(self._workload, policy.block_rows):
            return None
        played = (policy.block_rows, policy.sweep_tokens)
        if played not in self._means:
            self._means[played] = self._mean(*played)
        return self._means[played]

    def _mean(self, block_rows: int, sweep_tokens: int) -> Load:
        workload = self._workload
        job = simulate(
            workload,
            block_rows=block_rows,
            sweep_tokens=sweep_tokens,
            seconds=lambda load: 1.0,
            steady_tokens_per_s=block_rows,
        )
        rows = job.num_tokens / job.job_s
        return load_of(
            workload,
            rows=rows,
            prompt_tokens=workload.num_rows * workload.mean_own_tokens / job.job_s,
            live_tokens=rows * workload.mean_live_tokens + workload.num_kept_once_tokens,
        )


def fetched_otherwise(shape: ModelShape, whole: Candidate) -> Candidate | None:
    """The same with layers that come in units, where they are larger than those, or else with slots
    for more of them; None where they can only be computed with whole.
    """
    base = whole.base
    unit_bytes = UNIT_BYTES[base.compute]
    if max(shape.layer_bytes) <= unit_bytes:
        return dataclasses.replace(whole, base=dataclasses.replace(base, num_slots=UNIT_SLOTS))
    if any(tensor.is_whole for tensors in shape.layers for tensor in tensors):
        return None
    cut = dataclasses.replace(base, unit_bytes=unit_bytes, num_slots=UNIT_SLOTS)
    if whole.away is not Away.FETCHED and not cut.may_cut_sweeps:
        # One micro-batch goes along with the units, and stays one while rows live on one tier.
        return dataclasses.replace(whole, base=cut, away=Away.NONE)
    # Several hold all of a layer.
    streamed = dataclasses.replace(
        cut, layer_splits=tuple(Split.on(Tier.DISK, each) for each in shape.layer_bytes)
    )
    num_slots = held_units(shape, streamed) + _AHEAD
    return dataclasses.replace(whole, base=dataclasses.replace(cut, num_slots=num_slots))


def smallest(shape: ModelShape, budgets: Budgets, wishes: Wishes) -> list[Candidate]:
    """Those of which one takes the least of a tier: in small micro-batches, or in one that goes along
    with a layer's units.
    """
    situation = wishes.situation
    assert situation is not None, "a program is of a machine and a workload"
    compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU
    rows = wishes.block_rows or 1
    sweep_tokens = wishes.sweep_tokens or _LEAST_CHUNK_TOKENS
    small, one = (
        _base(
            shape,
            compute,
            rows=rows,
            sweep_tokens=sweep_tokens,
            micro_batch_tokens=micro_batch_tokens,
        )
        for micro_batch_tokens in (_LEAST_CHUNK_TOKENS, rows + sweep_tokens)
    )
    away = Away.BESIDE if compute is Tier.GPU else Away.NONE
    found = [candidate(shape, situation, base, away) for base in (small, one)]
    others = [fetched_otherwise(shape, each) for each in found]
    return [found[0], *(each for each in others if each is not None)]


def candidate(shape: ModelShape, situation: Situation, base: Policy, away: Away) -> Candidate:
    workload = situation.workload
    least = min(longest_row_tokens(workload), _paged(shape.max_context_tokens))
    kept = max(_paged(math.ceil(kept_tokens(workload, rows=base.block_rows))), least)
    if away is Away.FETCHED:
        part = max(least, -(-kept // _FETCHED_IN))
        base = dataclasses.replace(base, attends_beside=False, fetch_tokens=part)
    load = steady_load(workload, rows=base.block_rows, sweep_tokens=base.sweep_tokens)
    return Candidate(base=base, away=away, load=load, kept_tokens=kept)


def _row_counts(situation: Situation, wishes: Wishes) -> tuple[int, ...]:
    if wishes.block_rows is not None:
        return (wishes.block_rows,)
    most = situation.workload.num_rows
    return (*(rows for rows in _ROWS if rows < most), min(most, _ROWS[-1]))


def _chunk(workload: Workload, rows: int) -> int:
    """What the steady state needs."""
    needed = rows * workload.prompt_tokens_per_output * _CHUNK_SLACK
    return max(_LEAST_SWEEP_TOKENS, _paged(math.ceil(needed)))


def _larger_chunks(workload: Workload, rows: int) -> list[int]:
    if not _is_short(workload, rows):
        return []
    steady = _chunk(workload, rows)
    every = _paged(math.ceil(rows * workload.mean_own_tokens))
    chunks = {min(every, times * steady) for times in _LARGER_CHUNKS}
    return sorted(each for each in chunks if each > steady)


def _is_short(workload: Workload, block_rows: int) -> bool:
    return workload.num_rows < _STEADY_BLOCKS * block_rows


def _micro_batches(tokens: int) -> tuple[int, ...]:
    """All tokens of a sweep at once, or fewer."""
    return (*(each for each in _MICRO_BATCHES if each < tokens), tokens)


def _base(
    shape: ModelShape, compute: Tier, *, rows: int, sweep_tokens: int, micro_batch_tokens: int
) -> Policy:
    return Policy(
        compute=compute,
        compute_dtype=shape.compute_dtype,
        block_rows=rows,
        sweep_tokens=sweep_tokens,
        micro_batch_tokens=micro_batch_tokens,
        kv=Split.on(compute, 0),
        layer_splits=tuple(Split.on(compute, num_bytes) for num_bytes in shape.layer_bytes),
        reason="",
    )


def _paged(num_tokens: int) -> int:
    return -(-num_tokens // KV_PAGE_TOKENS) * KV_PAGE_TOKENS
