"""Peak bytes of each tier, as small named terms, and whether they fit the budgets."""

from typing import Final

from engine.config import Budgets
from engine.errors import BudgetError
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape

NUM_SLOTS: Final = 2
"""Layers whose streamed part is on the compute tier at once: the one computing and the next."""

KV_PAGE_TOKENS: Final = 16
"""Tokens that keys and values are handed out by."""

_STAGING_SLACK_BYTES: Final = 2 * 4096  # a direct read starts and ends on page borders


def outer_bytes(shape: ModelShape) -> int:
    """Embedding, final norm and head, resident on the compute tier."""
    return shape.computed_bytes(shape.outer_bytes)


def slot_bytes(shape: ModelShape, splits: tuple[Split, ...], compute: Tier) -> int:
    """The slots that streamed layer parts are computed from, beside the staging buffers."""
    if shape.reads_in_place(compute):
        return 0
    largest = max((split.streamed_bytes(compute) for split in splits), default=0)
    return NUM_SLOTS * shape.computed_bytes(largest)


def staging_bytes(splits: tuple[Split, ...]) -> int:
    """Host buffers that direct reads land in, one a slot."""
    largest = max((split.disk_bytes for split in splits), default=0)
    return NUM_SLOTS * (largest + _STAGING_SLACK_BYTES) if largest else 0


def activation_bytes(
    shape: ModelShape, *, sweep_tokens: int, micro_batch_tokens: int, block_rows: int
) -> int:
    """What a sweep holds beside weights and KV, at 4 bytes an element.

    Of every token of the sweep its hidden state, residual and position; of one micro-batch the
    attention's and the MLP's intermediates; of every row its logits, with two copies to sample.
    """
    tokens = sweep_tokens + block_rows
    carried = 4 * tokens * shape.hidden_size
    widest = min(tokens, micro_batch_tokens) * (8 * shape.hidden_size + 3 * shape.intermediate_size)
    logits = 3 * block_rows * shape.vocab_size
    return 4 * (carried + widest + logits)


def fetch_bytes(shape: ModelShape, policy: Policy) -> int:
    """Two buffers of one layer's keys and values, for micro-batches that live on another tier."""
    away = sum(policy.kv[tier] for tier in Tier if tier is not policy.compute)
    if not away or policy.attends_beside:
        return 0
    tokens = policy.fetch_tokens + policy.micro_batch_tokens
    layer_bytes = -(-shape.kv_bytes_per_token // shape.num_layers)
    return 2 * min(-(-away // shape.num_layers), tokens * layer_bytes)


def hidden_bytes(shape: ModelShape, policy: Policy) -> int:
    """Hidden states of all of a sweep's tokens, where they wait between layers."""
    tokens = policy.sweep_tokens + policy.block_rows
    return tokens * shape.hidden_size * shape.compute_itemsize


def compute_tier_bytes(shape: ModelShape, policy: Policy) -> int:
    """Peak bytes of weights, slots and activations on the compute tier, without KV."""
    resident = sum(
        split.gpu_bytes if policy.compute is Tier.GPU else split.cpu_bytes
        for split in policy.layer_splits
    )
    return (
        outer_bytes(shape)
        + shape.computed_bytes(resident)
        + slot_bytes(shape, policy.layer_splits, policy.compute)
        + activation_bytes(
            shape,
            sweep_tokens=policy.sweep_tokens,
            micro_batch_tokens=policy.micro_batch_tokens,
            block_rows=policy.block_rows,
        )
    )


def peak_bytes(shape: ModelShape, policy: Policy) -> dict[Tier, int]:
    """Peak bytes of each tier under `policy`; of disk, what is streamed from or spilled to it."""
    peaks = dict.fromkeys(Tier, 0)
    peaks[policy.compute] += compute_tier_bytes(shape, policy)
    for tier in Tier:
        peaks[tier] += policy.kv[tier]
    peaks[policy.compute] += fetch_bytes(shape, policy)
    if policy.hidden_tier is not None:
        peaks[policy.hidden_tier] += hidden_bytes(shape, policy)
    peaks[Tier.CPU] += staging_bytes(policy.layer_splits)
    if policy.compute is Tier.GPU:
        peaks[Tier.CPU] += sum(split.cpu_bytes for split in policy.layer_splits)
    peaks[Tier.DISK] += sum(split.disk_bytes for split in policy.layer_splits)
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
