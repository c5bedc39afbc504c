"""Policies that the planner might have chosen and did not: legal ones, over all that it decides."""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

from engine.config import Budgets
from engine.errors import BudgetError
from engine.planning.cost import KV_PAGE_TOKENS, check_budgets, with_spare_kv
from engine.planning.load import kept_tokens
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape, leading_border_bytes, total_bytes
from engine.planning.workload import Workload

_Item = TypeVar("_Item")

_ROWS: Final = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
_CHUNKS: Final = (0.5, 1.0, 2.0)
_RESIDENT: Final = (1.0, 0.5, 0.0)
"""Of the largest share of every layer that the budget holds beside the rows."""
_SHARES: Final = 32
_MICRO_BATCHES: Final = (1, 4)
_SLOTS: Final = ((None, 2), (None, 4), (4, 4))
"""Parts that a layer is fetched in, or None for whole, and slots."""


def alternatives(
    shape: ModelShape,
    budgets: Budgets,
    workload: Workload,
    planned: Policy,
    *,
    count: int,
    seed: int,
) -> list[Policy]:
    """As many legal policies around the planned one, drawn from all of the grid, no two alike."""
    points = list(itertools.product(_ROWS, _CHUNKS, _RESIDENT, _MICRO_BATCHES, _SLOTS))
    random.Random(seed).shuffle(points)
    found: list[Policy] = []
    for rows_share, chunk, resident, num_micro_batches, (num_parts, num_slots) in points:
        if len(found) == count:
            break
        if num_parts and num_micro_batches > 1:
            continue  # several micro-batches would need slots for all of a layer's parts
        rows = max(1, min(workload.num_rows, round(rows_share * planned.block_rows)))
        sweep_tokens = max(KV_PAGE_TOKENS, round(chunk * planned.sweep_tokens))
        base = dataclasses.replace(
            planned,
            block_rows=rows,
            sweep_tokens=sweep_tokens,
            micro_batch_tokens=-(-(rows + sweep_tokens) // num_micro_batches),
            num_slots=num_slots,
            unit_bytes=-(-max(shape.layer_bytes) // num_parts) if num_parts else None,
            kv=Split.on(Tier.CPU, _kv_bytes(shape, workload, rows)),
            attends_beside=True,
            reason=f"{rows} rows, {sweep_tokens} prompt tokens, in {num_micro_batches}, "
            f"{resident:.0%} of what fits resident, parts {num_parts or 1}, slots {num_slots}",
        )
        policy = _fullest(shape, budgets, base, resident)
        if policy is not None and all(_decided(policy) != _decided(each) for each in found):
            found.append(policy)
    return found


def interleaved(others: Sequence[_Item], one: _Item, *, times: int) -> list[_Item]:
    """The others in their order, and `one` first, last and evenly between them."""
    at = [round(turn * len(others) / max(1, times - 1)) for turn in range(times)]
    ordered: list[_Item] = []
    for index in range(len(others) + 1):
        ordered += [one] * at.count(index)
        ordered += others[index : index + 1]
    return ordered


def in_turns(policies: Sequence[_Item], *, times: int) -> list[_Item]:
    """Each of them so many times, and each as often early in a turn as late: a machine that changes while a
    turn is run meets all of them alike.
    """
    count = len(policies)
    return [policies[(turn + place) % count] for turn in range(times) for place in range(count)]


def _decided(policy: Policy) -> Policy:
    return dataclasses.replace(policy, reason="")


def _kv_bytes(shape: ModelShape, workload: Workload, rows: int) -> int:
    tokens = max(workload.longest_tokens + KV_PAGE_TOKENS, round(kept_tokens(workload, rows=rows)))
    return tokens * shape.kv_bytes_per_token


def _fullest(shape: ModelShape, budgets: Budgets, base: Policy, resident: float) -> Policy | None:
    """With that share of the largest legal share of every layer resident; None if none is legal."""
    for kept in range(_SHARES, -1, -1):
        share = kept / _SHARES
        if any(_fits(shape, each, budgets) for each in _placed(shape, base, share)):
            less = _placed(shape, base, share * resident)
            policy = next((each for each in less if _fits(shape, each, budgets)), None)
            return policy and with_spare_kv(shape, policy, budgets)
    return None


def _placed(shape: ModelShape, base: Policy, share: float) -> Iterator[Policy]:
    """With head and embedding resident, then the embedding on disk, then both."""
    layers = tuple(
        Split(gpu_bytes=0, cpu_bytes=kept, disk_bytes=total_bytes(tensors) - kept)
        for tensors in shape.layers
        for kept in [leading_border_bytes(tensors, int(share * total_bytes(tensors)))]
    )
    table = Split.on(Tier.DISK, shape.embedding.num_bytes) if shape.embedding else None
    head = Split.on(Tier.DISK, shape.head.num_bytes) if shape.head else None
    for head_split, embedding_split in ((None, None), (None, table), (head, table)):
        yield dataclasses.replace(
            base, layer_splits=layers, head_split=head_split, embedding_split=embedding_split
        )


def _fits(shape: ModelShape, policy: Policy, budgets: Budgets) -> bool:
    try:
        check_budgets(shape, policy, budgets)
    except BudgetError:
        return False
    return True
