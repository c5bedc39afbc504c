"""What a model will weigh and cost, off its headers, or off its config alone where no weights are."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from engine.compute.attention import ATTENTION_NAME
from engine.compute.dtypes import compute_dtype_of
from engine.compute.experts import EXPERTS_NAME
from engine.compute.skeleton import build_skeleton
from engine.memory.checkpoint import Checkpoint, find_gguf, open_checkpoint, read_config
from engine.memory.conversion import Conversion
from engine.memory.layout import BUFFERS, lay_out
from engine.memory.manifest import PackGroup, place_group
from engine.memory.pack_plan import place_groups
from engine.memory.safetensors import INDEX_FILE, SINGLE_FILE
from engine.memory.shapes import model_shape, model_work
from engine.planning.flops import Work
from engine.planning.shape import ModelShape

_NOWHERE: Final = Path("nowhere")
_STORED_DTYPE: Final = torch.bfloat16
"""Of a config that does not tell."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Foresight:
    """What a planner is told of a model: as its engine would be, on a GPU or without one."""

    shape: ModelShape
    work: Work
    max_context_tokens: int
    has_weights: bool


def foresee(source: Path, *, on_gpu: bool, compute_dtype: str | None = None) -> Foresight:
    """Of a safetensors folder, a GGUF file, or a folder with nothing but a `config.json`.

    Reads no weights. Raises CheckpointError, UnsupportedModelError,
    ComputeDtypeError.
    """
    if _has_weights(source):
        checkpoint = open_checkpoint(source)
        dtype = compute_dtype_of(compute_dtype, stored=checkpoint.stored_dtype, on_gpu=on_gpu)
        model = _skeleton(checkpoint.config, dtype)
        return _foresight(_groups_of(checkpoint, model), model, checkpoint.config, dtype=dtype)
    config = read_config(source)
    stored = getattr(config, "dtype", None) or _STORED_DTYPE
    dtype = compute_dtype_of(compute_dtype, stored=stored, on_gpu=on_gpu)
    model = _skeleton(config, dtype)
    groups = _groups_foreseen(model, stored)
    return _foresight(groups, model, config, dtype=dtype, has_weights=False)


def _has_weights(source: Path) -> bool:
    if not (source / "config.json").is_file():
        return True  # a file, a folder around one, or nothing: opening it will tell
    names = (SINGLE_FILE, INDEX_FILE)
    return find_gguf(source) is not None or any((source / name).is_file() for name in names)


def _foresight(
    groups: Sequence[PackGroup],
    model: Any,
    config: Any,
    *,
    dtype: torch.dtype,
    has_weights: bool = True,
) -> Foresight:
    shape = model_shape(groups, model, config, dtype=dtype)
    return Foresight(
        shape=shape,
        work=model_work(groups, config, dtype=dtype),
        max_context_tokens=shape.max_context_tokens,
        has_weights=has_weights,
    )


def _skeleton(config: Any, dtype: torch.dtype) -> Any:
    return build_skeleton(config, attention=ATTENTION_NAME, experts=EXPERTS_NAME, dtype=dtype)


def _groups_of(checkpoint: Checkpoint, model: Any) -> tuple[PackGroup, ...]:
    """As an engine reads them: in the source's own order, where it needs no pack of them."""
    return place_groups(Conversion(checkpoint, model), _NOWHERE, in_place=True)


def _groups_foreseen(model: Any, stored: torch.dtype) -> tuple[PackGroup, ...]:
    """As a pack would be of weights that are all stored alike."""
    layout = lay_out(model)
    parameters = dict(model.named_parameters())
    groups = []
    for group in layout.group_names:
        names = [name for name, its in layout.group_of.items() if its == group != BUFFERS]
        tensors = {
            name: torch.empty(parameters[name].shape, dtype=stored, device="meta") for name in names
        }
        groups += [place_group(group, _NOWHERE, 0, tensors)] if tensors else []
    return tuple(groups)
