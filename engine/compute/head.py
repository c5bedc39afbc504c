"""The head, once a sweep for all rows that sample and all tokens that are scored: resident rows of its
matrix, then tile by tile what streams. Knows no micro-batches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from engine.compute.linear import Multiplier
from engine.compute.lockstep import gate_head
from engine.compute.scores import TILE_TOKENS, RunningScores
from engine.compute.tail import Tail, watch_tail
from engine.errors import UnsupportedModelError
from engine.memory.matrix import Matrix, Slice
from engine.memory.weights import WeightSource


class Head:
    """Visits every one of the head's streamed tiles in each call, in order."""

    def __init__(
        self,
        module: Any,
        weights: WeightSource,
        multiplier: Multiplier,
        *,
        tail: Tail | UnsupportedModelError,
    ) -> None:
        """`tail` is what becomes of logits, or why that cannot be told: nothing is scored then."""
        self._matrix: Matrix = module.weight
        self._bias: torch.Tensor | None = module.bias
        self._weights = weights
        self._multiplier = multiplier
        self.tail = tail
        streamed = {id(part) for stage in weights.head_stages for part in weights.slices_of(stage)}
        self._resident = [part for part in self._matrix.slices if id(part) not in streamed]

    @property
    def hidden_size(self) -> int:
        return self._matrix.shape[1]

    @property
    def vocab_size(self) -> int:
        return self._matrix.shape[0]

    def __call__(self, hidden: torch.Tensor, scored: Sequence[RunningScores] = ()) -> torch.Tensor:
        """(rows, hidden) to float32 (rows, vocabulary); `scored` are shown what the model makes of
        their own rows' logits. Raises EngineError for tiles that cannot be read.
        """
        logits = hidden.new_empty(len(hidden), self.vocab_size, dtype=torch.float32)
        for part in self._parts():
            self._multiplier.logits(hidden, part.stored, logits[:, part.first : part.last])
            for scores in scored:
                self._show(scores, part)
        if self._bias is not None:
            logits += self._bias
        return logits

    def _parts(self) -> Iterator[Slice]:
        yield from self._resident
        for stage in self._weights.head_stages:
            self._weights.acquire(stage)
            yield from self._weights.slices_of(stage)
            self._weights.release(stage)

    def _show(self, scores: RunningScores, part: Slice) -> None:
        assert isinstance(self.tail, Tail), "prompts of this model are not scored"
        for first in range(part.first, part.last, TILE_TOKENS):
            last = min(first + TILE_TOKENS, part.last)
            stored = part.stored[first - part.first : last - part.first]
            for rows in scores.chunks():
                hidden = scores.hidden[rows]
                tile = hidden.new_empty(len(hidden), last - first, dtype=torch.float32)
                self._multiplier.logits(hidden, stored, tile)
                if self._bias is not None:
                    tile += self._bias[first:last]
                scores.add(rows, self.tail(tile), first_id=first)


def gated_head(model: Any, weights: WeightSource, multiplier: Multiplier) -> Head | None:
    """The model's head, given way to whoever drives the lockstep; None if it runs as the library
    wrote it.
    """
    module = model.get_output_embeddings()
    if module is None or not isinstance(module.weight, Matrix):
        return None
    gate_head(module)
    return Head(module, weights, multiplier, tail=_tail(model, module.weight))


def _tail(model: Any, matrix: Matrix) -> Tail | UnsupportedModelError:
    try:
        return watch_tail(
            model, hidden_size=matrix.shape[1], dtype=matrix.dtype, device=matrix.device
        )
    except UnsupportedModelError as error:
        return error
