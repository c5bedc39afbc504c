"""Shares cut into micro-batches: packed tokens, where they stand, and where their values go.

Knows what one forward call may carry; not what is computed, nor when.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.compute.attention import AttentionContext
from engine.compute.hidden import Hidden, hidden_on
from engine.compute.lockstep import MicroBatch
from engine.compute.packing import Packing
from engine.compute.segments import Segment
from engine.planning.policy import Policy
from engine.sweep.rows import Share
from engine.sweep.schedule import pack_micro_batches


class MicroBatches:
    """Makes those of each sweep. Close it."""

    def __init__(
        self, policy: Policy, context: AttentionContext, *, spill_dir: Path, device: torch.device
    ) -> None:
        self.policy = policy
        """May be changed between sweeps, in what a forward call may carry."""
        self._context = context
        self._spill_dir = spill_dir
        self._device = device
        self._hidden: list[Hidden | None] = []

    def cut(self, shares: Sequence[Share]) -> list[list[Share]]:
        """Rows of one tier, so many new tokens, so many to fetch."""
        policy = self.policy
        parts = []
        for tier, group in itertools.groupby(shares, key=lambda share: share.tier):
            same = list(group)
            is_fetched = tier is not policy.compute and not policy.attends_beside
            sizes = [
                (share.num_tokens, share.segment(0).context if is_fetched else 0) for share in same
            ]
            cuts = pack_micro_batches(
                sizes, limits=(policy.micro_batch_tokens, policy.fetch_tokens)
            )
            parts += [[same[index] for index in cut] for cut in cuts]
        return parts

    def make(self, parts: Sequence[Sequence[Share]]) -> list[MicroBatch]:
        return [self._micro_batch(index, part) for index, part in enumerate(parts)]

    def close(self) -> None:
        for hidden in self._hidden:
            if hidden is not None:
                hidden.close()

    def _micro_batch(self, index: int, part: Sequence[Share]) -> MicroBatch:
        token_ids: list[int] = []
        segments: list[Segment] = []
        sampled: list[int] = []
        scored: list[int] = []
        pooled: list[int] = []
        for share in part:
            start = len(token_ids)
            segments.append(share.segment(start=start))
            token_ids += share.token_ids()
            if share.samples:
                sampled.append(len(token_ids) - 1)
            read = scored if share.is_scored else pooled
            read += [start + at - share.row.num_cached for at in share.read_positions]
        wanted = [*sampled, *scored, *pooled]  # the order that `Readings` counts on
        positions = [at for segment in segments for at in range(segment.past, segment.context)]
        return MicroBatch(
            token_ids=torch.tensor([token_ids], device=self._device),
            positions=torch.tensor([positions], device=self._device),
            wanted=torch.tensor(wanted, dtype=torch.long, device=self._device),
            num_sampled=len(sampled),
            packing=self._packing(segments, part[0]),
            hidden=self._hidden_of(index),
        )

    def _packing(self, segments: Sequence[Segment], share: Share) -> Packing:
        cache = self._context.routes[share.tier].cache
        slots = [slot for segment in segments for slot in segment.new_slots]
        return Packing(
            tier=share.tier,
            segments=segments,
            slots=torch.tensor(slots, device=cache.device),
            num_slots=cache.num_tokens,
        )

    def _hidden_of(self, micro_batch: int) -> Hidden | None:
        """Each micro-batch of a sweep has its own place, the same in every sweep."""
        while len(self._hidden) <= micro_batch:
            compute = self.policy.compute
            tier = self.policy.hidden_tier or compute
            self._hidden.append(hidden_on(tier, compute=compute, spill_dir=self._spill_dir))
        return self._hidden[micro_batch]
