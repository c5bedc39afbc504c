"""Which group of the pack each of a model's tensors lies in. Touches no values."""

import dataclasses
from typing import Any, Final

from torch import nn

from engine.errors import UnsupportedModelError
from engine.memory.kinds import Kind, kinds_of

EMBED: Final = "embed"
HEAD: Final = "head"
BUFFERS: Final = "buffers"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`group_of` runs over `named_parameters()` names, then over persistent buffers; so does `kinds`
    over the former.

    In each group what is always resident comes first, so that what is placed lies in one stretch.
    `canonical` maps every name of a tied parameter to the one name `named_parameters()` gives it.
    """

    group_names: tuple[str, ...]
    group_of: dict[str, str]
    canonical: dict[str, str]
    kinds: dict[str, Kind]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers, first to last."""
    return list(_layer_list(model)[1])


def decoder_of(model: nn.Module) -> nn.Module:
    """What runs the layers, and gives their last hidden states, normed."""
    prefix, _ = _layer_list(model)
    return model.get_submodule(prefix.removesuffix(".").rpartition(".")[0])


def layer_group(layer: int) -> str:
    return f"layers.{layer}"


def lay_out(model: nn.Module) -> Layout:
    """Embedding tables first, then layer by layer, then all other parameters, then buffers."""
    prefix, layers = _layer_list(model)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kinds = kinds_of(model, layer_prefix=prefix)
    group_of: dict[str, str] = {}
    fixed_first = sorted(
        model.named_parameters(), key=lambda named: kinds[named[0]] is not Kind.FIXED
    )
    for name, parameter in fixed_first:
        if name.startswith(prefix):
            group_of[name] = layer_group(int(name.removeprefix(prefix).split(".")[0]))
        else:
            group_of[name] = EMBED if id(parameter) in tables else HEAD
    canonical = _canonical_names(model)
    for name in model.state_dict():
        if name not in canonical:
            canonical[name] = name
            group_of[name] = BUFFERS
    order = (EMBED, *(layer_group(i) for i in range(len(layers))), HEAD, BUFFERS)
    used = set(group_of.values())
    return Layout(
        group_names=tuple(name for name in order if name in used),
        group_of=group_of,
        canonical=canonical,
        kinds=kinds,
    )


def _canonical_names(model: nn.Module) -> dict[str, str]:
    name_by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    every_name = model.named_parameters(remove_duplicate=False)
    return {name: name_by_id[id(parameter)] for name, parameter in every_name}


def _layer_list(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of layers and its name in the model, with the dot that follows it."""
    # The library's own look-up misses a decoder called `model` beside a head called `decoder`, say.
    for decoder in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        for attribute in ("layers", "h", "blocks"):
            layers = getattr(decoder, attribute, None)
            if isinstance(layers, nn.ModuleList):
                names = {id(module): name for name, module in model.named_modules()}
                return f"{names[id(layers)]}.", layers
    raise UnsupportedModelError(
        f"{type(model).__name__} keeps its layers where they are not looked for: no ModuleList "
        f"named layers, h or blocks in {type(model.get_decoder()).__name__}"
    )
