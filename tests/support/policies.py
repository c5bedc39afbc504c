"""Policies for tests that want a placement and not the best one."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from engine.config import Budgets
from engine.engine import PolicyMaker
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape, Placeable, leading_border_bytes, total_bytes

_KV_TOKENS: Final = 4096


def streaming(
    resident: float,
    *,
    hosted: float = 0.0,
    head: float | None = None,
    embedding: float = 1.0,
    kv_tier: Tier | None = None,
    kv_bytes: int | None = None,
    **changes: Any,
) -> PolicyMaker:
    """Of every layer the leading rows resident, up to that fraction of its bytes; the rest on disk.
    Of the head too, if `head` says no other fraction; of an untied embedding `embedding`.

    With a GPU, up to the fraction `hosted` lies in host memory. Keys and values get `kv_bytes` of
    `kv_tier`, if not told otherwise enough of the compute tier. `changes` are fields of `Policy`.
    """

    def make(shape: ModelShape, budgets: Budgets) -> Policy:
        compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU

        def split(tensors: Sequence[Placeable], fraction: float) -> Split:
            return split_tensors(tensors, compute, resident=fraction, hosted=hosted)

        policy = Policy(
            compute=compute,
            compute_dtype=shape.compute_dtype,
            block_rows=8,
            sweep_tokens=64,
            micro_batch_tokens=64,
            kv=Split.on(
                kv_tier or compute,
                _KV_TOKENS * shape.kv_bytes_per_token if kv_bytes is None else kv_bytes,
            ),
            layer_splits=tuple(split(tensors, resident) for tensors in shape.layers),
            head_split=split(shape.head_tensors, resident if head is None else head)
            if shape.head
            else None,
            embedding_split=split(shape.embedding_tensors, embedding) if shape.embedding else None,
            reason=f"a test asked for {resident} of every layer to be resident",
        )
        return dataclasses.replace(policy, **changes)

    return make


def split_tensors(
    tensors: Sequence[Placeable], compute: Tier, *, resident: float, hosted: float = 0.0
) -> Split:
    """`tensors` in the pack's order, cut at the last borders within the fractions."""
    total = total_bytes(tensors)
    kept = leading_border_bytes(tensors, int(resident * total))
    if compute is Tier.CPU:
        return Split(gpu_bytes=0, cpu_bytes=kept, disk_bytes=total - kept)
    near = max(kept, leading_border_bytes(tensors, kept + int(hosted * total)))
    return Split(gpu_bytes=kept, cpu_bytes=near - kept, disk_bytes=total - near)
