"""A planner of fixed rules: everything resident if it fits, else the head first, then the same part
of every layer.

It measures nothing and promises nothing about speed; it keeps every budget or says which lacks what.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

from engine.config import Budgets
from engine.errors import BudgetError
from engine.planning.cost import (
    KV_PAGE_TOKENS,
    check_budgets,
    compute_tier_bytes,
    fixed_bytes,
    kv_bytes_within,
    peak_bytes,
)
from engine.planning.planners.base import Wishes
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape, Placeable, leading_border_bytes, total_bytes
from engine.planning.units import UNIT_BYTES, UNIT_SLOTS

_BLOCK_ROWS: Final = {Tier.CPU: 96, Tier.GPU: 256}
_SWEEP_TOKENS: Final = {Tier.CPU: 512, Tier.GPU: 4096}
_LEAST_KV_TOKENS: Final = 256
_LIKELY_ROW_TOKENS: Final = 512
"""Prompt and answer: rows seldom grow to the longest that the model could take."""

_KV_SHARE: Final = 0.5
"""Of what is left after the activations and what is always resident, where it is tight."""

_SHARES: Final = tuple(step / 128 for step in range(128, -1, -1))
"""Of the head, then of every layer on the compute tier, and up to there in host memory: the first
that fits."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Shares:
    """How much of the head, and of every layer."""

    head: float = 0.0
    layers: float = 0.0


def plan_fixed(shape: ModelShape, budgets: Budgets, wishes: Wishes) -> Policy:
    """All weights on the compute tier if they leave KV its share. Else the embedding's rows are
    read as tokens ask for them; the head resides as far as it can, its read having little to hide
    behind; and if it does, the same leading part of every layer.
    """
    compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU
    block_rows = wishes.block_rows or _BLOCK_ROWS[compute]
    sweep_tokens = wishes.sweep_tokens or _SWEEP_TOKENS[compute]
    everywhere = Policy(
        compute=compute,
        compute_dtype=shape.compute_dtype,
        block_rows=block_rows,
        sweep_tokens=sweep_tokens,
        # All that a sweep carries in one forward: what a second one would add is few tokens.
        micro_batch_tokens=block_rows + sweep_tokens,
        kv=Split.on(compute, 0),
        layer_splits=tuple(Split.on(compute, num_bytes) for num_bytes in shape.layer_bytes),
        num_slots=UNIT_SLOTS,
        unit_bytes=UNIT_BYTES[compute],
        reason="",
    )
    policy = _give_kv(shape, _place_weights(shape, budgets, everywhere), budgets)
    _require_room_for_kv(shape, policy, budgets)
    check_budgets(shape, policy, budgets)
    return dataclasses.replace(policy, reason=_reason(shape, policy, budgets))


def _place_weights(shape: ModelShape, budgets: Budgets, everywhere: Policy) -> Policy:
    """The first placement, from all resident to all streamed, that leaves KV its share."""
    room_bytes = _budget_bytes(everywhere, budgets) - _kv_share_bytes(shape, budgets, everywhere)

    def fits(policy: Policy) -> bool:
        return peak_bytes(shape, policy)[policy.compute] <= room_bytes

    if fits(everywhere):
        return everywhere
    streaming = _without_embedding(shape, everywhere)
    resident = next(
        (each for each in _residencies() if fits(_placed(shape, streaming, each))), _Shares()
    )
    if everywhere.compute is Tier.CPU:
        return _placed(shape, streaming, resident)
    return _host(shape, budgets, streaming, resident)


def _kv_share_bytes(shape: ModelShape, budgets: Budgets, everywhere: Policy) -> int:
    """What KV is given before weights are: what rows are likely to use, or its share where memory is
    tight.
    """
    needed = fixed_bytes(
        shape,
        sweep_tokens=everywhere.sweep_tokens,
        micro_batch_tokens=everywhere.micro_batch_tokens,
        block_rows=everywhere.block_rows,
    )
    free_bytes = _budget_bytes(everywhere, budgets) - needed
    likely_bytes = _kv_bytes(shape, everywhere, row_tokens=_LIKELY_ROW_TOKENS)
    return max(0, min(likely_bytes, int(free_bytes * _KV_SHARE)))


def _without_embedding(shape: ModelShape, policy: Policy) -> Policy:
    if shape.embedding is None:
        return policy
    on_disk = Split(gpu_bytes=0, cpu_bytes=0, disk_bytes=shape.embedding.num_bytes)
    return dataclasses.replace(policy, embedding_split=on_disk)


def _residencies() -> Iterator[_Shares]:
    """From all of head and layers to nothing: layers go first."""
    yield from (_Shares(head=1.0, layers=each) for each in _SHARES)
    yield from (_Shares(head=each) for each in _SHARES)


def _placed(
    shape: ModelShape, policy: Policy, resident: _Shares, near: _Shares | None = None
) -> Policy:
    """The leading shares of every layer and of the head on the compute tier; on a GPU machine what
    follows up to the shares `near` in host memory.
    """
    near = near or resident

    def split(tensors: Sequence[Placeable], share: float, host_share: float) -> Split:
        return _split(tensors, policy.compute, share=share, host_share=host_share)

    return dataclasses.replace(
        policy,
        layer_splits=tuple(
            split(tensors, resident.layers, near.layers) for tensors in shape.layers
        ),
        head_split=split(shape.head_tensors, resident.head, near.head) if shape.head else None,
    )


def _split(
    tensors: Sequence[Placeable], compute: Tier, *, share: float, host_share: float
) -> Split:
    total = total_bytes(tensors)
    kept = leading_border_bytes(tensors, int(share * total))
    if compute is Tier.CPU:
        return Split(gpu_bytes=0, cpu_bytes=kept, disk_bytes=total - kept)
    near = max(kept, leading_border_bytes(tensors, int(host_share * total)))
    return Split(gpu_bytes=kept, cpu_bytes=near - kept, disk_bytes=total - near)


def _host(shape: ModelShape, budgets: Budgets, policy: Policy, resident: _Shares) -> Policy:
    """With a GPU that holds `resident`: of the rest as much in host memory as its budget holds."""

    def fits(policy: Policy) -> bool:
        return peak_bytes(shape, policy)[Tier.CPU] <= budgets.host_bytes

    hosted = next(
        (found for near in _residencies() if fits(found := _placed(shape, policy, resident, near))),
        _placed(shape, policy, resident),
    )
    if shape.embedding is None:
        return hosted
    table = Split(gpu_bytes=0, cpu_bytes=shape.embedding.num_bytes, disk_bytes=0)
    near = dataclasses.replace(hosted, embedding_split=table)
    return near if fits(near) else hosted


def _give_kv(shape: ModelShape, policy: Policy, budgets: Budgets) -> Policy:
    """KV gets all that is left of its tier, as far as the block can use it."""
    left_bytes = _budget_bytes(policy, budgets) - peak_bytes(shape, policy)[policy.compute]
    most_bytes = _kv_bytes(shape, policy, row_tokens=shape.max_context_tokens)
    kv_bytes = min(most_bytes, kv_bytes_within(shape, policy.compute, left_bytes))
    return dataclasses.replace(policy, kv=Split.on(policy.compute, kv_bytes))


def _kv_bytes(shape: ModelShape, policy: Policy, *, row_tokens: int) -> int:
    """Of rows that grow to so many tokens, or to as many as the model can take."""
    tokens = _paged(min(row_tokens, shape.max_context_tokens))
    return policy.block_rows * tokens * shape.kv_bytes_per_token


def _paged(num_tokens: int) -> int:
    return -(-num_tokens // KV_PAGE_TOKENS) * KV_PAGE_TOKENS


def _budget_bytes(policy: Policy, budgets: Budgets) -> int:
    return budgets.gpu_bytes if policy.compute is Tier.GPU else budgets.host_bytes


def _require_room_for_kv(shape: ModelShape, policy: Policy, budgets: Budgets) -> None:
    least_tokens = _paged(min(shape.max_context_tokens, _LEAST_KV_TOKENS))
    least_bytes = shape.kv_bytes_per_token * least_tokens
    kv_bytes = policy.kv[policy.compute]
    if kv_bytes < least_bytes:
        raise BudgetError(
            f"the {policy.compute} tier has {_budget_bytes(policy, budgets):,} bytes: beside "
            f"activations, slots and what cannot be streamed "
            f"({compute_tier_bytes(shape, policy):,} bytes) {kv_bytes:,} bytes are left for "
            f"keys and values, and {least_tokens} tokens of them need {least_bytes:,} bytes"
        )


def _reason(shape: ModelShape, policy: Policy, budgets: Budgets) -> str:
    total = sum(shape.layer_bytes) + total_bytes(shape.head_tensors)
    if policy.streamed_bytes == 0:
        where = f"all {total:,} bytes of layers and head fit the {policy.compute} tier"
    else:
        where = f"{policy.streamed_bytes:,} of {total:,} weight bytes are streamed each sweep"
    kv_tokens = policy.kv[policy.compute] // shape.kv_bytes_per_token
    return (
        f"fixed rules within {_budget_bytes(policy, budgets):,} bytes: {where}; "
        f"KV holds {kv_tokens:,} tokens"
    )
