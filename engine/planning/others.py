"""Policies that other systems are known for, as ours would carry them out; none is ever chosen."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

from engine.config import Budgets
from engine.planning.cost import peak_bytes
from engine.planning.load import kept_tokens
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape, Placeable, leading_border_bytes, total_bytes
from engine.planning.workload import Workload

_ROWS: Final = tuple(2**power for power in range(12, -1, -1))
_FLEXGEN: Final = (
    # What the paper ran OPT-30B and OPT-175B with on a T4: rows a GPU batch, batches, weights' share
    # on the GPU and in host memory, and where keys and values lie.
    ("FlexGen's policy for OPT-30B", 48, 3, 0.20, 1.0, Tier.CPU),
    ("FlexGen's policy for OPT-175B", 32, 8, 0.0, 0.5, Tier.DISK),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KnownPolicy:
    label: str
    policy: Policy


def known_policies(shape: ModelShape, budgets: Budgets, workload: Workload) -> list[KnownPolicy]:
    """Those that fit the budgets, each with as many rows as it has room for, or as it is known for."""
    compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU
    where = "GPU" if compute is Tier.GPU else "CPU"
    found = [
        ("all in GPU memory" if compute is Tier.GPU else "all in memory", _all_resident),
        (f"Accelerate's: whole layers, {where} first", _whole_layers),
    ]
    made = [
        KnownPolicy(label=label, policy=policy)
        for label, make in found
        if (policy := _with_most_rows(shape, budgets, workload, make(shape, budgets)))
    ]
    return [*made, *_flexgen(shape, budgets, workload)]


def _all_resident(shape: ModelShape, budgets: Budgets) -> list[Policy]:
    compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU
    return [_base(shape, compute, tuple(Split.on(compute, each) for each in shape.layer_bytes))]


def _whole_layers(shape: ModelShape, budgets: Budgets) -> list[Policy]:
    """From as many layers on the compute tier as there are to none; the next in host memory. Each is
    fetched when it is asked for.
    """
    compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU
    count = shape.num_layers
    return [
        dataclasses.replace(_base(shape, compute, splits), overlap=False)
        for near in range(count, -1, -1)
        for hosted in (range(count - near, -1, -1) if compute is Tier.GPU else (0,))
        for splits in [_first_come(shape, compute, near=near, hosted=hosted)]
    ]


def _first_come(shape: ModelShape, compute: Tier, *, near: int, hosted: int) -> tuple[Split, ...]:
    return tuple(
        Split.on(compute if at < near else Tier.CPU if at < near + hosted else Tier.DISK, num_bytes)
        for at, num_bytes in enumerate(shape.layer_bytes)
    )


def _flexgen(shape: ModelShape, budgets: Budgets, workload: Workload) -> Iterator[KnownPolicy]:
    if not budgets.gpu_bytes:
        return
    for label, rows, batches, near, hosted, kv_tier in _FLEXGEN:
        splits = tuple(_shared_out(tensors, near, hosted) for tensors in shape.layers)
        base = dataclasses.replace(_base(shape, Tier.GPU, splits), hidden_tier=Tier.CPU)
        policy = _filled(shape, workload, base, rows=rows * batches, kv_tier=kv_tier)
        policy = dataclasses.replace(policy, micro_batch_tokens=max(rows, policy.sweep_tokens))
        if _fits(shape, policy, budgets):
            yield KnownPolicy(label=label, policy=policy)


def _shared_out(tensors: Sequence[Placeable], near: float, hosted: float) -> Split:
    """The same shares of every layer."""
    total = total_bytes(tensors)
    kept = leading_border_bytes(tensors, int(near * total))
    held = max(kept, leading_border_bytes(tensors, int(hosted * total)))
    return Split(gpu_bytes=kept, cpu_bytes=held - kept, disk_bytes=total - held)


def _with_most_rows(
    shape: ModelShape, budgets: Budgets, workload: Workload, bases: Sequence[Policy]
) -> Policy | None:
    """The first placement that has room for a row, with as many as it has room for."""
    for base in bases:
        for rows in _ROWS:
            policy = _filled(shape, workload, base, rows=rows, kv_tier=base.compute)
            if _fits(shape, policy, budgets):
                return policy
    return None


def _filled(
    shape: ModelShape, workload: Workload, base: Policy, *, rows: int, kv_tier: Tier
) -> Policy:
    chunk = max(64, int(rows * workload.prompt_tokens_per_output) + 1)
    kv_bytes = int(kept_tokens(workload, rows=rows) + 1) * shape.kv_bytes_per_token
    return dataclasses.replace(
        base,
        block_rows=rows,
        sweep_tokens=chunk,
        micro_batch_tokens=rows + chunk,
        kv=Split.on(kv_tier, kv_bytes),
    )


def _fits(shape: ModelShape, policy: Policy, budgets: Budgets) -> bool:
    limits = {
        Tier.GPU: budgets.gpu_bytes,
        Tier.CPU: budgets.host_bytes,
        Tier.DISK: budgets.disk_bytes,
    }
    return all(peak <= limits[tier] for tier, peak in peak_bytes(shape, policy).items())


def _base(shape: ModelShape, compute: Tier, splits: tuple[Split, ...]) -> Policy:
    return Policy(
        compute=compute,
        compute_dtype=shape.compute_dtype,
        block_rows=1,
        sweep_tokens=1,
        micro_batch_tokens=1,
        kv=Split.on(compute, 0),
        layer_splits=splits,
        reason="known of another system",
    )
