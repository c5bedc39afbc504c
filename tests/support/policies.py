"""Policies for tests that want a placement and not the best one."""

import dataclasses
from typing import Any, Final

from engine.config import Budgets
from engine.engine import PolicyMaker
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape

_KV_TOKENS: Final = 4096


def streaming(
    resident: float,
    *,
    hosted: float = 0.0,
    kv_tier: Tier | None = None,
    kv_bytes: int | None = None,
    **changes: Any,
) -> PolicyMaker:
    """Of every layer the leading tensors resident, up to that fraction of its bytes; the rest on disk.

    With a GPU, up to the fraction `hosted` lies in host memory. Keys and values get `kv_bytes` of
    `kv_tier`, if not told otherwise enough of the compute tier. `changes` are fields of `Policy`.
    """

    def make(shape: ModelShape, budgets: Budgets) -> Policy:
        compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU
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
            layer_splits=tuple(
                split_layer(tensors, compute, resident=resident, hosted=hosted)
                for tensors in shape.layer_tensor_bytes
            ),
            reason=f"a test asked for {resident} of every layer to be resident",
        )
        return dataclasses.replace(policy, **changes)

    return make


def split_layer(
    tensors: tuple[int, ...], compute: Tier, *, resident: float, hosted: float = 0.0
) -> Split:
    """`tensors` are the layer's bytes, tensor by tensor, in the pack's order."""
    kept = _leading_bytes(tensors, int(resident * sum(tensors)))
    if compute is Tier.CPU:
        return Split(gpu_bytes=0, cpu_bytes=kept, disk_bytes=sum(tensors) - kept)
    near = _leading_bytes(tensors, kept + int(hosted * sum(tensors)))
    return Split(gpu_bytes=kept, cpu_bytes=near - kept, disk_bytes=sum(tensors) - near)


def _leading_bytes(tensors: tuple[int, ...], limit_bytes: int) -> int:
    """Bytes of the leading tensors that fit in `limit_bytes`."""
    taken = 0
    for num_bytes in tensors:
        if taken + num_bytes > limit_bytes:
            break
        taken += num_bytes
    return taken
