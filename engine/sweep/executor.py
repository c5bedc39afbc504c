"""Carries out one sweep: shares in, sampled tokens out, weights there when each layer needs them.

It obeys the schedule and knows neither why rows take part nor what becomes of their tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from engine.compute.attention import AttentionContext
from engine.compute.draws import Draw
from engine.compute.head import Head
from engine.compute.lockstep import Lockstep, MicroBatch
from engine.compute.sampling import Sampled, sample
from engine.errors import EngineError, UnsupportedModelError
from engine.memory.weights import WeightSource
from engine.planning.flops import Work
from engine.sweep.micro_batches import MicroBatches
from engine.sweep.readings import Readings
from engine.sweep.rows import Row, Share
from engine.sweep.schedule import steps, with_next
from engine.sweep.step_clock import StepClock
from engine.timeline import Timeline, Track


class Swept(NamedTuple):
    """What a sweep brought: the tokens of the shares that sample, in order, and the readings of the
    rows that are read.
    """

    tokens: list[Sampled]
    readings: dict[Row, torch.Tensor]


class Executor:
    """Runs sweeps over one model. `context` has a route for every tier that rows live on."""

    def __init__(
        self,
        model: Any,  # transformers' models are untyped
        *,
        num_layers: int,
        num_attentions: int,
        weights: WeightSource,
        head: Head | None,
        context: AttentionContext,
        micro_batches: MicroBatches,
        eos_token_ids: Sequence[int],
        device: torch.device,
        work: Work,
        timeline: Timeline,
    ) -> None:
        self._model = model
        self._num_layers = num_layers
        self._num_attentions = num_attentions
        self._attentions_a_layer = num_attentions // num_layers  # mostly one
        self._weights = weights
        self._head = head
        self._context = context
        self._micro_batches = micro_batches
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = device
        self._work = work
        self._timeline = timeline
        self._num_steps = 0
        self._broke_off = False  # in the last sweep, in the middle of its weights

    @property
    def num_steps(self) -> int:
        """Taken so far, and units of weights that came for them, in the middle of a sweep too."""
        return self._num_steps + self._weights.counters.num_units

    def run(self, shares: Sequence[Share]) -> Swept:
        """Sweep once. Raises EngineError, or what the model raised; the rows are then as they were
        before.
        """
        parts = self._micro_batches.cut(shares)
        readings = Readings(parts, vocab_size=self._head.vocab_size if self._head else 0)
        with torch.inference_mode():
            clock = StepClock(self._timeline, self._device)
            logits = self._forward(self._micro_batches.make(parts), readings, clock)
            with clock.span(Track.SAMPLING, "sampling"):
                tokens = [
                    token
                    for part, rows in zip(parts, logits, strict=True)
                    for token in self._sample(part, rows)
                ]
            found = readings.by_row()
        clock.settle()
        return Swept(tokens, found)

    def _forward(
        self, batches: Sequence[MicroBatch], readings: Readings, clock: StepClock
    ) -> list[torch.Tensor]:
        self._context.num_calls = 0
        if self._broke_off:
            # Only now: who was interrupted for good does not wait for weights that nobody needs.
            self._weights.rewind()
            self._broke_off = False
        self._weights.begin(sum(batch.token_ids.shape[1] for batch in batches))
        with Lockstep(self._model, self._context, batches) as lockstep:
            try:
                self._walk(lockstep, batches, clock)
                self._run_head(lockstep, batches, readings, clock)
                self._context.settle()
            except BaseException:
                self._broke_off = True  # a caller that drops the bad row can go on
                self._context.abandon()
                raise
        expected = self._num_attentions * len(batches)
        if self._context.num_calls != expected:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} called attention {self._context.num_calls} times "
                f"where its config promises {expected}: it does not dispatch every layer"
            )
        return [rows for rows in lockstep.logits if rows is not None]

    def _walk(self, lockstep: Lockstep, batches: Sequence[MicroBatch], clock: StepClock) -> None:
        lockstep.start()
        self._context.prepare(batches[0].packing, 0)
        parked: list[int] = []
        for step, coming in with_next(steps(self._num_layers, len(batches))):
            if step.is_first:
                self._weights.acquire(step.layer, num_forwards=len(batches))
            if coming is not None:
                attention = coming.layer * self._attentions_a_layer
                self._context.prepare(batches[coming.micro_batch].packing, attention)
            flops = self._layer_flops(step.layer, batches[step.micro_batch])
            with clock.span(Track.LAYERS, f"layer {step.layer}", flops=flops):
                is_through = lockstep.step(step.micro_batch)
            self._num_steps += 1
            if not is_through:
                parked.append(step.micro_batch)
            if step.is_last:
                self._unpark(lockstep, parked, step.layer, clock)
                self._weights.release(step.layer)

    def _unpark(self, lockstep: Lockstep, parked: list[int], layer: int, clock: StepClock) -> None:
        """Let those that wait for attention beside their keys and values end the layer."""
        while parked:
            with clock.span(Track.LAYERS, f"layer {layer}, after attention"):
                is_through = lockstep.step(parked[0])
            self._num_steps += 1
            if is_through:
                del parked[0]

    def _run_head(
        self,
        lockstep: Lockstep,
        batches: Sequence[MicroBatch],
        readings: Readings,
        clock: StepClock,
    ) -> None:
        """Once for all rows that sample and all tokens that are scored; a head that is not gated has
        run with the last layer, and nothing is read there.
        """
        head = self._head
        if head is not None:
            num_rows = sum(batch.num_sampled for batch in batches) + readings.num_scored
            with clock.span(Track.HEAD, "head", flops=self._work.head_flops(num_rows)):
                lockstep.run_head(lambda sampled, read: head(sampled, readings.begin(read)))

    def _layer_flops(self, layer: int, batch: MicroBatch) -> int:
        seen = batch.packing.attended(self._work.windows[layer])
        matrices = self._work.matrix_flops(layer, batch.token_ids.shape[1])
        return matrices + self._work.attention_flops(seen.num_pairs)

    def _sample(self, part: Sequence[Share], logits: torch.Tensor) -> list[Sampled]:
        draws = [
            Draw(
                sampling=share.row.prompt.sampling,
                index=share.row.index,
                prompt=share.row.prompt.token_ids,
                generated=share.row.generated,
                matcher=share.row.matcher,
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
