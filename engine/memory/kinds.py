"""What kind of use a model makes of each parameter, and so how it may be placed. Touches no values."""

import enum
import functools
import inspect
from typing import Any, Final

from torch import nn
from transformers.pytorch_utils import Conv1D

EXPERTS_NAME: Final = "freight"
"""The experts implementation that asks stacks for one expert at a time (`stack[expert]`)."""


class Kind(enum.Enum):
    """How a parameter is used."""

    FIXED = "always resident, in compute dtype"
    MATRIX = "an nn.Linear's weight"
    TRANSPOSED = "a Conv1D's weight, whose rows are input features"
    STACK = "experts' matrices, asked for one by one"
    WHOLE = "experts' matrices that the library computes with as one tensor"
    TABLE = "the embedding's rows"
    HEAD = "the head's matrix"
    TIED_HEAD = "the head's matrix and the embedding's rows in one"


Owner = tuple[nn.Module, str]


def parameter_owners(model: nn.Module) -> dict[str, list[Owner]]:
    """By parameter name, every module attribute that holds it: tied weights have several."""
    by_identity: dict[int, list[Owner]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            by_identity.setdefault(id(parameter), []).append((module, attribute))
    return {name: by_identity[id(parameter)] for name, parameter in model.named_parameters()}


def kinds_of(model: Any, *, layer_prefix: str) -> dict[str, Kind]:
    """The kind of every parameter. Layers' matrices stream; outside of layers head and table do."""
    looked_at = _looked_at(model)
    return {
        name: _kind_in_layer(owners, looked_at)
        if name.startswith(layer_prefix)
        else _kind_outside(owners, model)
        for name, owners in parameter_owners(model).items()
    }


def _looked_at(model: nn.Module) -> set[nn.Module]:
    """Modules whose weight their parent uses itself, past their forward: routers mostly."""
    kinds = {type(module) for module in model.modules()}
    sources = {kind: _source(kind) for kind in kinds}  # type: ignore[arg-type]  # takes it for its instances
    return {
        child
        for module in model.modules()
        for name, child in module.named_children()
        if f".{name}.weight" in sources[type(module)]
    }


@functools.cache
def _source(kind: type[nn.Module]) -> str:
    """Of the class and of what it inherits from the library."""
    own = [each for each in kind.__mro__ if each.__module__.startswith("transformers.models.")]
    return "".join(map(inspect.getsource, own))


def _kind_in_layer(owners: list[Owner], looked_at: set[nn.Module]) -> Kind:
    [(module, attribute), *others] = owners
    parameter = getattr(module, attribute)
    if others or module in looked_at:
        return Kind.FIXED
    if parameter.ndim > 2:
        return Kind.STACK if _asks_by_expert(module) else Kind.WHOLE
    if attribute != "weight":
        return Kind.FIXED
    if is_plain_linear(module):
        return Kind.MATRIX
    return Kind.TRANSPOSED if type(module) is Conv1D else Kind.FIXED


def _kind_outside(owners: list[Owner], model: Any) -> Kind:
    modules = [module for module, attribute in owners if attribute == "weight"]
    if len(modules) < len(owners):
        return Kind.FIXED
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    heads = [module for module in modules if module is head and is_plain_linear(module)]
    tables = [module for module in modules if module is table and _is_lookup(module)]
    if len(heads) + len(tables) < len(modules):
        return Kind.FIXED
    if heads:
        return Kind.TIED_HEAD if tables else Kind.HEAD
    return Kind.TABLE


def is_plain_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_lookup(module: Any) -> bool:
    """Whether all the module asks of its table is `F.embedding`, in nn.Embedding's own forward."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    forward = type(module).forward
    return forward is nn.Embedding.forward or "super().forward(" in inspect.getsource(forward)


def _asks_by_expert(module: Any) -> bool:
    """Modules that dispatch to the experts' functions are marked with their layout."""
    config = getattr(module, "config", None)
    implementation = getattr(config, "_experts_implementation", None)
    return implementation == EXPERTS_NAME and hasattr(module, "is_transposed")
