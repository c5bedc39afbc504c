"""Carries out one sweep: shares in, sampled tokens out, weights there when each layer needs them.

It obeys the schedule and knows neither why rows take part nor what becomes of their tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch

from engine.compute.attend import Segment
from engine.compute.attention import AttentionContext, Packing
from engine.compute.lockstep import Lockstep, MicroBatch
from engine.compute.sampling import Draw, sample
from engine.errors import EngineError, UnsupportedModelError
from engine.memory.weights import WeightSource
from engine.planning.flops import Attended, Work, attended
from engine.sweep.block import Share
from engine.sweep.schedule import pack_micro_batches, steps
from engine.sweep.step_clock import StepClock
from engine.timeline import Timeline, Track


class Executor:
    def __init__(
        self,
        model: Any,  # transformers' models are untyped
        *,
        num_layers: int,
        weights: WeightSource,
        context: AttentionContext,
        micro_batch_tokens: int,
        eos_token_ids: Sequence[int],
        device: torch.device,
        work: Work,
        timeline: Timeline,
    ) -> None:
        self._model = model
        self._num_layers = num_layers
        self._weights = weights
        self._context = context
        self._micro_batch_tokens = micro_batch_tokens
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = device
        self._work = work
        self._timeline = timeline

    def run(self, shares: Sequence[Share]) -> list[int]:
        """Sweep once; the next tokens of the shares that sample, in order.

        Raises EngineError, or what the model raised; the rows are then as they were before.
        """
        cuts = pack_micro_batches(
            [share.num_tokens for share in shares], max_tokens=self._micro_batch_tokens
        )
        parts = [[shares[index] for index in cut] for cut in cuts]
        with torch.inference_mode():
            clock = StepClock(self._timeline, self._device)
            batches = [self._micro_batch(part) for part in parts]
            logits = self._forward(batches, clock)
            with clock.span(Track.SAMPLING, "sampling"):
                tokens = [
                    token
                    for part, rows in zip(parts, logits, strict=True)
                    for token in self._sample(part, rows)
                ]
        clock.settle()
        return tokens

    def _forward(self, batches: Sequence[MicroBatch], clock: StepClock) -> list[torch.Tensor]:
        self._context.num_calls = 0
        with Lockstep(self._model, self._context, batches) as lockstep:
            try:
                self._walk(lockstep, batches, clock)
            except BaseException:
                self._weights.rewind()  # a caller that drops the bad row can go on
                raise
        expected = self._num_layers * len(batches)
        if self._context.num_calls != expected:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} called attention {self._context.num_calls} times "
                f"in a sweep of {expected} layer visits: it does not dispatch every layer"
            )
        return [rows for rows in lockstep.logits if rows is not None]

    def _walk(self, lockstep: Lockstep, batches: Sequence[MicroBatch], clock: StepClock) -> None:
        attends = [self._attended(batch) for batch in batches]
        lockstep.start()
        for step in steps(self._num_layers, len(batches)):
            if step.is_first:
                self._weights.acquire(step.layer)
            batch = batches[step.micro_batch]
            seen = attends[step.micro_batch][self._work.windows[step.layer]]
            flops = self._work.matrix_flops(step.layer, batch.token_ids.shape[1])
            flops += self._work.attention_flops(seen.num_pairs)
            with clock.span(Track.LAYERS, f"layer {step.layer}", flops=flops):
                lockstep.step(step.micro_batch)
            self._note_attention(step.layer, seen)
            if step.is_last:
                self._weights.release(step.layer)
        for index, batch in enumerate(batches):
            while lockstep.logits[index] is None:  # the forward stopped before the head
                flops = self._work.head_flops(len(batch.wanted))
                with clock.span(Track.HEAD, "head", flops=flops):
                    lockstep.step(index)

    def _attended(self, batch: MicroBatch) -> dict[int | None, Attended]:
        """By window, of any layer that has it."""
        segments = [(segment.num_tokens, segment.past) for segment in batch.packing.segments]
        return {window: attended(segments, window=window) for window in set(self._work.windows)}

    def _note_attention(self, layer: int, seen: Attended) -> None:
        if self._context.attended_s is not None:
            started_s, ended_s = self._context.attended_s
            self._timeline.add(
                Track.ATTENTION,
                f"attention {layer}",
                started_s=started_s,
                ended_s=ended_s,
                num_bytes=seen.num_cached * self._work.kv_bytes_per_token,
                flops=self._work.attention_flops(seen.num_pairs),
            )
            self._context.attended_s = None

    def _micro_batch(self, part: Sequence[Share]) -> MicroBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        segments = []
        for share in part:
            row = share.row
            assert row.run is not None, "a row without pages takes no part"
            past, slot = row.num_cached, row.run.slot
            segments.append(
                Segment(start=len(token_ids), num_tokens=share.num_tokens, past=past, slot=slot)
            )
            token_ids += row.pending_tokens(share.num_tokens)
            positions += range(past, past + share.num_tokens)
            slots += range(slot + past, slot + past + share.num_tokens)
            if share.samples:
                wanted.append(len(token_ids) - 1)
        on_device = self._device
        return MicroBatch(
            token_ids=torch.tensor([token_ids], device=on_device),
            positions=torch.tensor([positions], device=on_device),
            wanted=torch.tensor(wanted, dtype=torch.long, device=on_device),
            packing=Packing(
                segments=segments, slots=torch.tensor(slots, device=self._context.cache.device)
            ),
        )

    def _sample(self, part: Sequence[Share], logits: torch.Tensor) -> list[int]:
        draws = [
            Draw(sampling=share.row.prompt.sampling, position=len(share.row.generated))
            for share in part
            if share.samples
        ]
        if not draws:
            return []
        try:
            return sample(logits, draws, eos_token_ids=self._eos_token_ids)
        except ValueError as error:
            raise EngineError(f"the model's answer cannot be sampled: {error}") from error
