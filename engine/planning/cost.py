"""Peak bytes of each tier, as small named terms, and whether they fit the budgets."""

import dataclasses
from collections.abc import Sequence
from typing import Final

from engine.config import Budgets
from engine.errors import BudgetError
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import (
    ModelShape,
    Placeable,
    resident_bytes,
    total_bytes,
    unpacked_bytes,
)

KV_PAGE_TOKENS: Final = 16
"""Tokens that keys and values are handed out by."""

TILE_BYTES: Final = 8 * 2**20
"""Rows of a matrix that are turned into compute dtype at once, in compute dtype."""

HEAD_TILE_BYTES: Final = 32 * 2**20
"""Rows of the head that are streamed at once where layers come whole and none is larger, in stored
dtype."""

SAMPLING_BYTES: Final = 32 * 2**20
"""Copies of logits that are sampled from at once, a few rows of them, beside the logits themselves;
before that, the tiles of logits that prompts' tokens are scored in."""

_SCRATCH_BYTES: Final = 4 * TILE_BYTES  # a tile, its copy inside the kernel, two products
_RUNTIME_BYTES: Final = 48 * 2**20  # the model's modules, threads, allocators' slack
_TOKENIZER_BYTES_PER_TOKEN: Final = 512  # of a vocabulary
_SPARE_SHARE: Final = 0.875  # what is kept back is for the activations of a larger block
_SPARE_BLOCKS: Final = 4
_SPARE_ROWS: Final = 64
_READ_SLACK_BYTES: Final = 2 * 4096  # a direct read starts and ends on page borders
_TENSOR_SLACK_BYTES: Final = 64  # tensors lie on cache lines


def slot_bytes(shape: ModelShape, policy: Policy) -> int:
    """One slot: the largest unit. At least a tile of a streamed head."""
    compute = policy.compute
    largest = 0
    for tensors, split in zip(shape.layers, policy.layer_splits, strict=True):
        if streamed := split.streamed_bytes(compute):
            unit_bytes = min(streamed, _largest_unit_bytes(tensors, policy))
            largest = max(largest, unit_bytes + len(tensors) * _TENSOR_SLACK_BYTES)
    head = policy.head_split.streamed_bytes(compute) if policy.head_split else 0
    largest = max(largest, min(head, _tile_bytes(shape, policy)))
    return largest + _READ_SLACK_BYTES if largest else 0


def _largest_unit_bytes(tensors: Sequence[Placeable], policy: Policy) -> int:
    """Of a layer all of which streams; a unit is one row, or one expert, at least."""
    if policy.unit_bytes is None or any(tensor.is_whole for tensor in tensors):
        return total_bytes(tensors)
    return max(policy.unit_bytes, *(tensor.granule_bytes for tensor in tensors))


def _tile_bytes(shape: ModelShape, policy: Policy) -> int:
    if policy.unit_bytes is None or shape.head is None:
        return HEAD_TILE_BYTES
    return max(policy.unit_bytes, shape.head.granule_bytes)


def activation_bytes(
    shape: ModelShape, *, sweep_tokens: int, micro_batch_tokens: int, block_rows: int
) -> int:
    """What a sweep holds beside weights and KV, at 4 bytes an element.

    Of every token of the sweep its hidden state, residual and position. Beside them, of one
    micro-batch the attention's intermediates, then the MLP's; and when layers are through, of every
    row its logits, and what sampling copies of them.
    """
    tokens = sweep_tokens + block_rows
    carried = 4 * tokens * shape.hidden_size
    widest = min(tokens, micro_batch_tokens) * max(
        8 * shape.hidden_size, 2 * shape.hidden_size + 3 * shape.intermediate_size
    )
    logits = (2 if shape.scales_logits else 1) * block_rows * shape.vocab_size
    return 4 * carried + max(4 * widest, 4 * logits + SAMPLING_BYTES)


def fixed_bytes(
    shape: ModelShape, *, sweep_tokens: int, micro_batch_tokens: int, block_rows: int
) -> int:
    """What the compute tier holds wherever weights and KV lie."""
    activations = activation_bytes(
        shape,
        sweep_tokens=sweep_tokens,
        micro_batch_tokens=micro_batch_tokens,
        block_rows=block_rows,
    )
    return shape.fixed_bytes + activations + _SCRATCH_BYTES


def fetch_bytes(shape: ModelShape, policy: Policy) -> int:
    """Two buffers of one layer's keys and values, for micro-batches that live on another tier; with a
    GPU as much again in host memory, where they are copied from.
    """
    away = sum(policy.kv[tier] for tier in Tier if tier is not policy.compute)
    if not away or policy.attends_beside:
        return 0
    tokens = policy.fetch_tokens + policy.micro_batch_tokens
    layer_bytes = shape.kv_layer_bytes_per_token or -(-shape.kv_bytes_per_token // shape.num_layers)
    return 2 * min(-(-away * layer_bytes // shape.kv_bytes_per_token), tokens * layer_bytes)


def hidden_bytes(shape: ModelShape, policy: Policy) -> int:
    """Hidden states of all of a sweep's tokens, where they wait between layers."""
    tokens = policy.sweep_tokens + policy.block_rows
    return 4 * tokens * shape.hidden_size


def compute_tier_bytes(shape: ModelShape, policy: Policy) -> int:
    """Peak bytes of weights, slots and activations on the compute tier, without KV."""
    compute = policy.compute
    resident = 0
    unpacked = 0
    for tensors, split in _units(shape, policy):
        leading = split.resident_bytes(compute)
        resident += resident_bytes(tensors, leading)
        unpacked = max(unpacked, unpacked_bytes(tensors, leading))
    fixed = fixed_bytes(
        shape,
        sweep_tokens=policy.sweep_tokens,
        micro_batch_tokens=policy.micro_batch_tokens,
        block_rows=policy.block_rows,
    )
    return fixed + resident + unpacked + policy.num_slots * slot_bytes(shape, policy)


def host_extra_bytes(shape: ModelShape, policy: Policy) -> int:
    """What host memory holds beside a compute tier's and KV's bytes."""
    runtime = _RUNTIME_BYTES + _TOKENIZER_BYTES_PER_TOKEN * shape.vocab_size
    if policy.compute is Tier.CPU:
        return runtime
    hosted = sum(
        split.cpu_bytes + len(tensors) * _TENSOR_SLACK_BYTES + _READ_SLACK_BYTES
        for tensors, split in _units(shape, policy)
        if split.cpu_bytes
    )
    return runtime + hosted + policy.num_slots * slot_bytes(shape, policy)


def _units(shape: ModelShape, policy: Policy) -> list[tuple[Sequence[Placeable], Split]]:
    """Whatever has a split of its own: layers, head, embedding."""
    units: list[tuple[Sequence[Placeable], Split]] = list(
        zip(shape.layers, policy.layer_splits, strict=True)
    )
    for tensor, split in (
        (shape.head, policy.head_split),
        (shape.embedding, policy.embedding_split),
    ):
        if tensor is not None:
            units.append(((tensor,), split or Split.on(policy.compute, tensor.num_bytes)))
    return units


def peak_bytes(shape: ModelShape, policy: Policy) -> dict[Tier, int]:
    """Peak bytes of each tier under `policy`; of disk, what is read from it or spilled to it."""
    peaks = dict.fromkeys(Tier, 0)
    peaks[policy.compute] += compute_tier_bytes(shape, policy)
    for tier in Tier:
        peaks[tier] += policy.kv[tier]
    for tier in {policy.compute, Tier.CPU}:
        peaks[tier] += fetch_bytes(shape, policy)
    if policy.hidden_tier is not None:
        peaks[policy.hidden_tier] += hidden_bytes(shape, policy)
    peaks[Tier.CPU] += host_extra_bytes(shape, policy)
    peaks[Tier.DISK] += sum(split.disk_bytes for _, split in _units(shape, policy))
    return peaks


def check_budgets(shape: ModelShape, policy: Policy, budgets: Budgets) -> None:
    """Raises BudgetError if the policy's peak of any tier is over its budget."""
    limits = {
        Tier.GPU: budgets.gpu_bytes,
        Tier.CPU: budgets.host_bytes,
        Tier.DISK: budgets.disk_bytes,
    }
    for tier, peak in peak_bytes(shape, policy).items():
        if peak > limits[tier]:
            raise BudgetError(
                f"the {tier} tier needs {peak:,} bytes under this policy and its budget is "
                f"{limits[tier]:,} bytes: {peak - limits[tier]:,} bytes are lacking"
            )
    page_bytes = KV_PAGE_TOKENS * shape.kv_bytes_per_token
    most_bytes = max(policy.kv[tier] for tier in Tier)
    if most_bytes < page_bytes:
        raise BudgetError(
            f"the policy gives keys and values {max(0, most_bytes):,} bytes of any one tier, and "
            f"one page of {KV_PAGE_TOKENS} tokens needs {page_bytes:,} bytes"
        )


def with_spare_kv(shape: ModelShape, policy: Policy, budgets: Budgets) -> Policy:
    """With most of what is left of the compute tier given to keys and values, as far as a block some
    times as large could use it: rows may turn out longer than was planned for, or be more.
    """
    limit = budgets.gpu_bytes if policy.compute is Tier.GPU else budgets.host_bytes
    left_bytes = limit - peak_bytes(shape, policy)[policy.compute]
    tokens = max(_SPARE_ROWS, _SPARE_BLOCKS * policy.block_rows) * shape.max_context_tokens
    room_bytes = tokens * shape.kv_bytes_per_token - policy.kv.total_bytes
    spare_bytes = max(0, min(int(_SPARE_SHARE * left_bytes), room_bytes))
    field = f"{policy.compute}_bytes"
    kv = dataclasses.replace(policy.kv, **{field: policy.kv[policy.compute] + spare_bytes})
    return dataclasses.replace(policy, kv=kv)
