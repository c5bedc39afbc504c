"""Peak bytes of each tier, as small named terms, and whether they fit the budgets."""

from typing import Final

from engine.config import Budgets
from engine.errors import BudgetError
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape

NUM_SLOTS: Final = 2
"""Layers whose streamed part is on the compute tier at once: the one computing and the next."""

_STAGING_SLACK_BYTES: Final = 2 * 4096  # a direct read starts and ends on page borders


def outer_bytes(shape: ModelShape) -> int:
    """Embedding, final norm and head, resident on the compute tier."""
    return shape.computed_bytes(shape.outer_bytes)


def slot_bytes(shape: ModelShape, splits: tuple[Split, ...], compute: Tier) -> int:
    """The slots that streamed layer parts are computed from."""
    largest = max((split.streamed_bytes(compute) for split in splits), default=0)
    return NUM_SLOTS * shape.computed_bytes(largest)


def staging_bytes(splits: tuple[Split, ...]) -> int:
    """Host buffers that direct reads land in, one a slot."""
    largest = max((split.disk_bytes for split in splits), default=0)
    return NUM_SLOTS * (largest + _STAGING_SLACK_BYTES) if largest else 0


def activation_bytes(shape: ModelShape, *, micro_batch_tokens: int, block_rows: int) -> int:
    """Hidden states, the widest intermediates, and logits of the rows that sample with two copies
    of them for sampling; 4 bytes an element.
    """
    hidden = micro_batch_tokens * (12 * shape.hidden_size + 3 * shape.intermediate_size)
    logits = 3 * min(block_rows, micro_batch_tokens) * shape.vocab_size
    return 4 * (hidden + logits)


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
            micro_batch_tokens=policy.micro_batch_tokens,
            block_rows=policy.block_rows,
        )
    )


def peak_bytes(shape: ModelShape, policy: Policy) -> dict[Tier, int]:
    """Peak bytes of each tier under `policy`; disk counts the packed weights themselves."""
    peaks = dict.fromkeys(Tier, 0)
    peaks[policy.compute] += compute_tier_bytes(shape, policy)
    peaks[policy.kv_tier] += policy.kv_bytes
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
