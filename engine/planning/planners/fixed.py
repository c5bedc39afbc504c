"""A planner of fixed rules: outer weights resident, KV its share, layers resident as far as they fit.

It measures nothing and promises nothing about speed; it keeps every budget or says which lacks what.
"""

import dataclasses
from typing import Final

from engine.config import Budgets
from engine.errors import BudgetError
from engine.planning.cost import (
    KV_PAGE_TOKENS,
    NUM_SLOTS,
    activation_bytes,
    check_budgets,
    outer_bytes,
)
from engine.planning.planners.base import Wishes
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape

_BLOCK_ROWS: Final = {Tier.CPU: 96, Tier.GPU: 256}
_SWEEP_TOKENS: Final = {Tier.CPU: 512, Tier.GPU: 4096}
_MICRO_BATCH_TOKENS: Final = {Tier.CPU: 512, Tier.GPU: 4096}
_LEAST_KV_TOKENS: Final = 256
_KV_SHARE: Final = 0.5
"""Of what is left after the outer weights, the slots and the activations, where it is tight."""


def plan_fixed(shape: ModelShape, budgets: Budgets, wishes: Wishes) -> Policy:
    """Everything on the compute tier if it fits; else the same leading part of every layer."""
    compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU
    block_rows = wishes.block_rows or _BLOCK_ROWS[compute]
    sweep_tokens = wishes.sweep_tokens or _SWEEP_TOKENS[compute]
    micro_batch_tokens = max(block_rows, _MICRO_BATCH_TOKENS[compute])
    budget_bytes = budgets.gpu_bytes if compute is Tier.GPU else budgets.host_bytes
    needed_bytes = outer_bytes(shape) + activation_bytes(
        shape,
        sweep_tokens=sweep_tokens,
        micro_batch_tokens=micro_batch_tokens,
        block_rows=block_rows,
    )
    all_kv_bytes = block_rows * _paged(shape.max_context_tokens) * shape.kv_bytes_per_token
    kv_bytes, splits = _share(
        shape, budgets, compute, free_bytes=budget_bytes - needed_bytes, all_kv_bytes=all_kv_bytes
    )
    policy = Policy(
        compute=compute,
        compute_dtype=shape.compute_dtype,
        block_rows=block_rows,
        sweep_tokens=sweep_tokens,
        micro_batch_tokens=micro_batch_tokens,
        kv=Split.on(compute, kv_bytes),
        layer_splits=splits,
        reason="",
    )
    _require_room_for_kv(shape, policy, budget_bytes)
    check_budgets(shape, policy, budgets)
    return dataclasses.replace(policy, reason=_reason(shape, policy, budget_bytes))


def _share(
    shape: ModelShape, budgets: Budgets, compute: Tier, *, free_bytes: int, all_kv_bytes: int
) -> tuple[int, tuple[Split, ...]]:
    """KV bytes and layer splits within `free_bytes` of the compute tier."""
    all_weight_bytes = shape.computed_bytes(sum(shape.layer_bytes))
    if all_weight_bytes + all_kv_bytes <= free_bytes:
        return all_kv_bytes, _splits(shape, budgets, compute, all_weight_bytes)
    kv_bytes = min(all_kv_bytes, max(int(free_bytes * _KV_SHARE), free_bytes - all_weight_bytes))
    weight_bytes = free_bytes - kv_bytes
    if weight_bytes >= all_weight_bytes:
        return kv_bytes, _splits(shape, budgets, compute, weight_bytes)
    # Slots come off the weights' share; with whole layers in slots they are largest.
    largest = max(shape.layer_bytes)
    staged = NUM_SLOTS * (largest + 2 * 4096) if compute is Tier.CPU else 0
    slots = 0 if shape.reads_in_place(compute) else NUM_SLOTS * shape.computed_bytes(largest)
    resident_bytes = weight_bytes - slots - staged
    return max(kv_bytes, 0), _splits(shape, budgets, compute, max(0, resident_bytes))


def _splits(
    shape: ModelShape, budgets: Budgets, compute: Tier, resident_bytes: int
) -> tuple[Split, ...]:
    """The same share of every layer resident; on a GPU machine the next part in host memory."""
    fraction = min(1.0, resident_bytes / max(1, shape.computed_bytes(sum(shape.layer_bytes))))
    host_bytes = budgets.host_bytes if compute is Tier.GPU else 0
    splits = []
    for tensors in shape.layer_tensor_bytes:
        resident = _leading(tensors, int(fraction * sum(tensors)))
        rest = tensors[len(resident) :]
        staged = 2 * NUM_SLOTS * max(shape.layer_bytes)
        host = _leading(rest, max(0, host_bytes - staged) // shape.num_layers)
        disk_bytes = sum(rest[len(host) :])
        if compute is Tier.GPU:
            split = Split(gpu_bytes=sum(resident), cpu_bytes=sum(host), disk_bytes=disk_bytes)
        else:
            split = Split(gpu_bytes=0, cpu_bytes=sum(resident), disk_bytes=disk_bytes)
        splits.append(split)
    return tuple(splits)


def _leading(tensors: tuple[int, ...], limit_bytes: int) -> tuple[int, ...]:
    """The leading tensors that fit in `limit_bytes`."""
    taken = 0
    for index, num_bytes in enumerate(tensors):
        taken += num_bytes
        if taken > limit_bytes:
            return tensors[:index]
    return tensors


def _paged(num_tokens: int) -> int:
    return -(-num_tokens // KV_PAGE_TOKENS) * KV_PAGE_TOKENS


def _require_room_for_kv(shape: ModelShape, policy: Policy, budget_bytes: int) -> None:
    least_tokens = _paged(min(shape.max_context_tokens, _LEAST_KV_TOKENS))
    least_bytes = shape.kv_bytes_per_token * least_tokens
    kv_bytes = policy.kv[policy.compute]
    if kv_bytes < least_bytes:
        raise BudgetError(
            f"the {policy.compute} tier has {budget_bytes:,} bytes: beside outer weights, "
            f"activations and two layers {max(0, kv_bytes):,} bytes are left for keys and "
            f"values, and {least_tokens} tokens of them need {least_bytes:,} bytes"
        )


def _reason(shape: ModelShape, policy: Policy, budget_bytes: int) -> str:
    total = sum(shape.layer_bytes)
    if policy.streamed_bytes == 0:
        where = f"all {total:,} bytes of layers fit the {policy.compute} tier"
    else:
        where = f"{policy.streamed_bytes:,} of {total:,} layer bytes are streamed each sweep"
    kv_tokens = policy.kv[policy.compute] // shape.kv_bytes_per_token
    return f"fixed rules within {budget_bytes:,} bytes: {where}; KV holds {kv_tokens:,} tokens"
