"""Runs a model's own forward for several micro-batches, one layer at a time for all of them.

Each micro-batch's forward is a greenlet that stops before every decoder layer and before the head;
whoever drives decides which goes on. The library's code is not touched and not re-implemented.
Knows no weights, rows or sampling.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from engine.compute.attention import AttentionContext
from engine.compute.hidden import Hidden, may_leave
from engine.compute.packing import Packing
from engine.compute.routes import PARKED


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Packed tokens of one forward call, all on the compute device.

    `token_ids` and `positions` (1, tokens); `wanted` (rows,) are the places in the packing whose
    last hidden states are needed: the first `num_sampled` for their logits, the others to be read.
    `hidden` says where its hidden states wait, if not where they are.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    wanted: torch.Tensor
    num_sampled: int
    packing: Packing
    hidden: Hidden | None = None


class Lockstep:
    """One sweep's forwards. `step` runs one layer of one micro-batch; layers must go in order.

    As a context manager: leaving it ends forwards that were not driven to their end.
    """

    def __init__(
        self, model: nn.Module, context: AttentionContext, micro_batches: Sequence[MicroBatch]
    ) -> None:
        self._context = context
        self._micro_batches = micro_batches
        self._forwards = [
            greenlet(lambda batch=batch: _forward(model, batch)) for batch in micro_batches
        ]
        for forward, batch in zip(self._forwards, micro_batches, strict=True):
            forward.hidden = batch.hidden  # the gates find it there
        self._at_head: list[torch.Tensor | None] = [None] * len(micro_batches)
        self.logits: list[torch.Tensor | None] = [None] * len(micro_batches)

    def start(self) -> None:
        """Run every micro-batch up to its first layer: embeddings and positions."""
        for index in range(len(self._micro_batches)):
            self._resume(index)

    def step(self, micro_batch: int) -> bool:
        """Run the next layer of one micro-batch; after the last one also the norm, up to a gated
        head. A head that is not gated leaves (sampled rows, vocabulary) in `logits`. False if the
        micro-batch is parked halfway, waiting for attention: step it again after the others.
        """
        return self._resume(micro_batch) is not PARKED

    def run_head(self, head: Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]) -> None:
        """Run the gated head once for the sampled rows of all micro-batches, (rows, hidden) to
        (rows, vocabulary), and let each forward end; `logits` are then there. Beside them `head` is
        given what is to be read, (rows, hidden) of each micro-batch.
        """
        inputs = [hidden for hidden in self._at_head if hidden is not None]
        assert len(inputs) == len(self._forwards), "every micro-batch asks for its logits once"
        counts = [batch.num_sampled for batch in self._micro_batches]
        rows = [hidden.reshape(-1, hidden.shape[-1]) for hidden in inputs]
        sampled = torch.cat([each[:count] for each, count in zip(rows, counts, strict=True)])
        read = [each[count:] for each, count in zip(rows, counts, strict=True)]
        ends = torch.split(head(sampled, read), counts)
        leading = [hidden.shape[:-2] for hidden in inputs]
        self._at_head = [None] * len(inputs)
        for index, (shape, logits) in enumerate(zip(leading, ends, strict=True)):
            self._resume(index, logits.view(*shape, *logits.shape))

    def _resume(self, index: int, answer: torch.Tensor | None = None) -> Any:
        self._context.packing = self._micro_batches[index].packing
        forward = self._forwards[index]
        found = forward.switch() if answer is None else forward.switch(answer)
        if forward.dead:
            self.logits[index] = found
        elif isinstance(found, torch.Tensor):
            self._at_head[index] = found
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._context.packing = None
        for forward in self._forwards:
            if forward and not forward.dead:
                forward.throw()


def gate_layers(layers: Sequence[nn.Module]) -> None:
    """Make every layer's forward give way to the driver before it runs."""
    for layer in layers:
        layer.forward = _gated(layer.forward)


def gate_head(head: nn.Module) -> None:
    """Make the head give way to the driver with its input, and take its answer from there."""
    head.forward = _ask_driver


def _ask_driver(hidden: torch.Tensor) -> torch.Tensor:
    driver = getcurrent().parent
    assert driver is not None, "a gated model runs in lockstep only"
    logits: torch.Tensor = driver.switch(hidden)
    return logits


def _gated(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wait_then_forward(*arguments: Any, **options: Any) -> Any:
        current = getcurrent()
        assert current.parent is not None, "a gated model runs in lockstep only"
        states = arguments[0] if arguments else options["hidden_states"]
        hidden = current.hidden if may_leave(states) else None
        if hidden is not None:
            hidden.put(states)
        current.parent.switch()
        if hidden is not None:
            hidden.take(states)
        return forward(*arguments, **options)

    return wait_then_forward


def _forward(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    answer = model(
        input_ids=batch.token_ids,
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=batch.wanted,
    )
    logits: torch.Tensor = answer.logits[0]
    return logits
