"""Carries out one sweep: shares in, sampled tokens out, weights there when each layer needs them.

It obeys the schedule and knows neither why rows take part nor what becomes of their tokens.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.compute.attention import AttentionContext
from engine.compute.draws import Draw
from engine.compute.head import Head
from engine.compute.hidden import Hidden, hidden_on
from engine.compute.lockstep import Lockstep, MicroBatch
from engine.compute.packing import Packing
from engine.compute.sampling import Sampled, sample
from engine.compute.segments import Segment
from engine.errors import EngineError, UnsupportedModelError
from engine.memory.weights import WeightSource
from engine.planning.policy import Policy
from engine.sweep.block import Share
from engine.sweep.report import Report
from engine.sweep.schedule import pack_micro_batches, steps, with_next


class Executor:
    """Runs sweeps over one model. `context` has a route for every tier that rows live on."""

    def __init__(
        self,
        model: Any,  # transformers' models are untyped
        *,
        num_layers: int,
        weights: WeightSource,
        head: Head | None,
        context: AttentionContext,
        policy: Policy,
        spill_dir: Path,
        eos_token_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self._model = model
        self._num_layers = num_layers
        self._weights = weights
        self._head = head
        self._context = context
        self._policy = policy
        self._spill_dir = spill_dir
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = device
        self._hidden: list[Hidden | None] = []

    def close(self) -> None:
        for hidden in self._hidden:
            if hidden is not None:
                hidden.close()

    def run(self, shares: Sequence[Share], report: Report) -> list[Sampled]:
        """Sweep once; the next tokens of the shares that sample, in order.

        Raises EngineError, or what the model raised; the rows are then as they were before.
        """
        parts = self._cut(shares)
        with torch.inference_mode():
            batches = [self._micro_batch(index, part) for index, part in enumerate(parts)]
            logits = self._forward(batches)
            started_s = time.perf_counter()
            tokens = [
                token
                for part, rows in zip(parts, logits, strict=True)
                for token in self._sample(part, rows)
            ]
        report.sampling_s += time.perf_counter() - started_s
        return tokens

    def _forward(self, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        self._context.num_calls = 0
        with Lockstep(self._model, self._context, batches) as lockstep:
            try:
                self._walk(lockstep, [batch.packing for batch in batches])
                self._context.settle()
            except BaseException:
                self._context.abandon()
                self._weights.rewind()  # a caller that drops the bad row can go on
                raise
        expected = self._num_layers * len(batches)
        if self._context.num_calls != expected:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} called attention {self._context.num_calls} times "
                f"in a sweep of {expected} layer visits: it does not dispatch every layer"
            )
        return [rows for rows in lockstep.logits if rows is not None]

    def _walk(self, lockstep: Lockstep, packings: Sequence[Packing]) -> None:
        lockstep.start()
        self._context.prepare(packings[0], 0)
        parked: list[int] = []
        for step, coming in with_next(steps(self._num_layers, len(packings))):
            if step.is_first:
                self._weights.acquire(step.layer)
            if coming is not None:
                self._context.prepare(packings[coming.micro_batch], coming.layer)
            if not lockstep.step(step.micro_batch):
                parked.append(step.micro_batch)
            if step.is_last:
                while parked:
                    if lockstep.step(parked[0]):
                        del parked[0]
                self._weights.release(step.layer)
        if self._head is not None:
            lockstep.run_head(self._head)

    def _cut(self, shares: Sequence[Share]) -> list[list[Share]]:
        """Micro-batches: rows of one tier, so many new tokens, so many to fetch."""
        policy = self._policy
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

    def _micro_batch(self, index: int, part: Sequence[Share]) -> MicroBatch:
        token_ids: list[int] = []
        segments: list[Segment] = []
        wanted: list[int] = []
        for share in part:
            segments.append(share.segment(start=len(token_ids)))
            token_ids += share.token_ids()
            if share.samples:
                wanted.append(len(token_ids) - 1)
        positions = [at for segment in segments for at in range(segment.past, segment.context)]
        slots = [slot for segment in segments for slot in segment.new_slots]
        tier = part[0].tier
        cache = self._context.routes[tier].cache
        return MicroBatch(
            token_ids=torch.tensor([token_ids], device=self._device),
            positions=torch.tensor([positions], device=self._device),
            wanted=torch.tensor(wanted, dtype=torch.long, device=self._device),
            packing=Packing(
                tier=tier,
                segments=segments,
                slots=torch.tensor(slots, device=cache.device),
                num_slots=cache.num_tokens,
            ),
            hidden=self._hidden_of(index),
        )

    def _hidden_of(self, micro_batch: int) -> Hidden | None:
        """Each micro-batch of a sweep has its own place, the same in every sweep."""
        while len(self._hidden) <= micro_batch:
            compute = self._policy.compute
            tier = self._policy.hidden_tier or compute
            self._hidden.append(hidden_on(tier, compute=compute, spill_dir=self._spill_dir))
        return self._hidden[micro_batch]

    def _sample(self, part: Sequence[Share], logits: torch.Tensor) -> list[Sampled]:
        draws = [
            Draw(
                sampling=share.row.prompt.sampling,
                index=share.row.index,
                prompt=share.row.prompt.token_ids,
                generated=share.row.generated,
            )
            for share in part
            if share.samples
        ]
        if not draws:
            return []
        try:
            return sample(logits, draws, eos_token_ids=self._eos_token_ids)
        except ValueError as error:
            raise EngineError(f"the model's answer cannot be sampled: {error}") from error
