"""The head, once a sweep for all rows that sample: resident rows of its matrix, then tile by tile
what streams. Knows no micro-batches.
"""

from typing import Any

import torch

from engine.compute.linear import Multiplier
from engine.compute.lockstep import gate_head
from engine.memory.matrix import Matrix
from engine.memory.weights import WeightSource


class Head:
    """Visits every one of the head's streamed tiles in each call, in order."""

    def __init__(self, module: Any, weights: WeightSource, multiplier: Multiplier) -> None:
        self._matrix: Matrix = module.weight
        self._bias: torch.Tensor | None = module.bias
        self._weights = weights
        self._multiplier = multiplier
        streamed = {id(part) for unit in weights.head_units for part in weights.slices_of(unit)}
        self._resident = [part for part in self._matrix.slices if id(part) not in streamed]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) to float32 (rows, vocabulary). Raises EngineError for tiles that cannot be
        read.
        """
        logits = hidden.new_empty(len(hidden), self._matrix.shape[0], dtype=torch.float32)
        for part in self._resident:
            self._multiplier.logits(hidden, part.stored, logits[:, part.first : part.last])
        for unit in self._weights.head_units:
            self._weights.acquire(unit)
            for part in self._weights.slices_of(unit):
                self._multiplier.logits(hidden, part.stored, logits[:, part.first : part.last])
            self._weights.release(unit)
        if self._bias is not None:
            logits += self._bias
        return logits


def gated_head(model: Any, weights: WeightSource, multiplier: Multiplier) -> Head | None:
    """The model's head, given way to whoever drives the lockstep; None if it runs as the library
    wrote it.
    """
    module = model.get_output_embeddings()
    if module is None or not isinstance(module.weight, Matrix):
        return None
    gate_head(module)
    return Head(module, weights, multiplier)
