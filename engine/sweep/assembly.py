"""The parts that one engine runs on, opened one after the other and closed in the reverse order; of
those that fail halfway nothing stays open. Knows no prompts.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.compute.attention import AttentionContext, attach
from engine.compute.fetched import Fetched
from engine.compute.head import Head, gated_head
from engine.compute.linear import Multiplier, ProductCounters, attach_multiplier
from engine.compute.lockstep import gate_layers
from engine.compute.routes import Beside, Here, Route
from engine.compute.skeleton import decoder_layers
from engine.memory.kv_cache import KVCache, KVShape
from engine.memory.manifest import Pack
from engine.memory.pack import load_buffers
from engine.memory.retention import PackHold
from engine.memory.shapes import kv_shapes
from engine.memory.weights import StreamedWeights, WeightSource
from engine.planning.flops import Work
from engine.planning.policy import Policy, Tier
from engine.sweep.block import Block
from engine.sweep.executor import Executor
from engine.sweep.micro_batches import MicroBatches
from engine.sweep.recorder import Recorder
from engine.timeline import Timeline


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What sweeps are made with. A row never outgrows `max_row_tokens`: keys and values have no more
    room on any tier.
    """

    block: Block
    executor: Executor
    weights: WeightSource
    micro_batches: MicroBatches
    head: Head | None
    products: ProductCounters
    max_row_tokens: int


def assemble(
    model: Any,  # transformers' models are untyped
    config: Any,
    *,
    pack: Pack,
    policy: Policy,
    work: Work,
    eos_token_ids: Collection[int],
    spill_dir: Path,
    timeline: Timeline,
    recorder: Recorder,
    undo: contextlib.ExitStack,
) -> Assembly:
    """Place the weights, bind them to the skeleton, and gate it. `undo` closes what is opened, also
    where this raises: BudgetError, CheckpointError, PackError, EngineError.
    """
    device = _device(policy.compute)
    undo.enter_context(contextlib.closing(PackHold(pack.path.parent)))
    caches = _open_caches(kv_shapes(config), policy, spill_dir, undo)
    context = _open_context(caches, policy, timeline, undo)
    attach(model, context)
    gate_layers(decoder_layers(model))
    weights = StreamedWeights(pack, model, policy, device=device, timeline=timeline)
    undo.callback(weights.close)
    multiplier = _complete(model, pack, policy, device)
    recorder.gemm_chosen(multiplier.gemm.reason)
    micro_batches = MicroBatches(policy, context, spill_dir=spill_dir, device=device)
    undo.callback(micro_batches.close)
    head = gated_head(model, weights, multiplier)
    executor = Executor(
        model,
        num_layers=len(decoder_layers(model)),
        num_attentions=len(kv_shapes(config)),
        weights=weights,
        head=head,
        context=context,
        micro_batches=micro_batches,
        eos_token_ids=sorted(eos_token_ids),
        device=device,
        work=work,
        timeline=timeline,
    )
    return Assembly(
        block=Block(caches, max_rows=policy.block_rows, on_preempt=recorder.preempted),
        executor=executor,
        weights=weights,
        micro_batches=micro_batches,
        head=head,
        products=multiplier.counters,
        max_row_tokens=max(cache.num_tokens for cache in caches),
    )


def _open_caches(
    shapes: Sequence[KVShape], policy: Policy, spill_dir: Path, undo: contextlib.ExitStack
) -> list[KVCache]:
    """One for each tier that keys and values get bytes of, fastest first."""
    caches = []
    for tier in Tier:
        if policy.kv[tier]:
            cache = KVCache(
                shapes,
                budget_bytes=policy.kv[tier],
                dtype=getattr(torch, policy.compute_dtype),
                tier=tier,
                spill_dir=spill_dir,
            )
            undo.callback(cache.close)
            caches += [cache] if cache.num_tokens else []
    return caches


def _open_context(
    caches: Sequence[KVCache], policy: Policy, timeline: Timeline, undo: contextlib.ExitStack
) -> AttentionContext:
    routes: dict[Tier, Route] = {}
    for cache in caches:
        routes[cache.tier] = _route(cache, policy, timeline)
        undo.callback(routes[cache.tier].close)
    return AttentionContext(routes)


def _route(cache: KVCache, policy: Policy, timeline: Timeline) -> Route:
    if cache.tier is policy.compute:
        return Here(cache, timeline)
    if policy.attends_beside:
        return Beside(cache, timeline)
    return Fetched(cache, device=_device(policy.compute), timeline=timeline)


def _complete(model: Any, pack: Pack, policy: Policy, device: torch.device) -> Multiplier:
    """Give a model whose parameters are in place its buffers, and what multiplies by its weights."""
    load_buffers(pack, model)
    model.to(device)  # buffers: every parameter is there already
    return attach_multiplier(model, dtype=getattr(torch, policy.compute_dtype), device=device)


def _device(tier: Tier) -> torch.device:
    return torch.device("cuda" if tier is Tier.GPU else "cpu")
