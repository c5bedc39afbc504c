"""What takes the place of each parameter of a skeleton: a value, or slices that come and go. Reads
nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from engine.memory.embedding import EmbeddingTable, RowReader
from engine.memory.kinds import Kind, parameter_owners
from engine.memory.layout import lay_out
from engine.memory.matrix import Matrix, Slice, Sliced, Stack, Whole
from engine.memory.placement import Piece


class Target(Protocol):
    """Something that computes from stored bytes while it is bound to them."""

    def bind(self, stored: torch.Tensor) -> None: ...
    def unbind(self) -> None: ...


class Binder:
    """Knows for each parameter its kind, its compute dtype and the modules that hold it."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.kinds = lay_out(model).kinds
        # The skeleton says in what dtype each parameter computes: some stay in float32.
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._owners = parameter_owners(model)
        self._embedding = model.get_input_embeddings()
        self._device = device
        self._sliced: dict[str, Sliced] = {}

    def bind_fixed(self, name: str, stored: torch.Tensor) -> None:
        value = stored.to(self._device, self.dtypes[name], copy=True)
        for module, attribute in self._owners[name]:
            setattr(module, attribute, nn.Parameter(value, requires_grad=False))

    def target(self, piece: Piece, *, is_streamed: bool) -> Target:
        """What the piece is bound to; pieces of one tensor must come in order."""
        name = piece.tensor.name
        if self.kinds[name] is Kind.WHOLE:
            [owner] = self._owners[name]
            return Whole(
                owner, dtype=self.dtypes[name], device=self._device, is_streamed=is_streamed
            )
        if name not in self._sliced:
            self._sliced[name] = self._replace(piece)
        return self._sliced[name].add(piece.first, piece.last)

    def bind_embedding(self, name: str, *, held: Sequence[Slice], reader: RowReader | None) -> None:
        table = EmbeddingTable(
            self._shapes[name],
            held=held,
            reader=reader,
            dtype=self.dtypes[name],
            device=self._device,
        )
        for module, attribute in self._owners[name]:
            if module is self._embedding:
                _put(module, attribute, table)

    def on_call_end(self, name: str, tell: Callable[[], None]) -> None:
        """`tell` whenever a call of the module that holds this weight is over."""
        for module, _ in self._owners[name]:
            module.register_forward_hook(lambda *_: tell())

    def _replace(self, piece: Piece) -> Sliced:
        name = piece.tensor.name
        kind = self.kinds[name]
        weight = (Stack if kind is Kind.STACK else Matrix)(
            piece.tensor.shape,
            dtype=self.dtypes[name],
            device=self._device,
            transposed=kind is Kind.TRANSPOSED,
        )
        for module, attribute in self._owners[name]:
            if module is not self._embedding:
                _put(module, attribute, weight)
        return weight


def _put(module: nn.Module, attribute: str, weight: object) -> None:
    """In the parameter's place, as a plain attribute."""
    delattr(module, attribute)
    setattr(module, attribute, weight)
