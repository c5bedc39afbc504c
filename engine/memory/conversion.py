"""From a source's tensors to a model's parameters, part by part, by the library's own rules.

Names, fusing and transposing are the library's: each part's source tensors go through its loader
into a weightless copy of the model and leave it again. Memory holds one part of a group (a tensor,
or tensors that are fused or split together), never the model.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import conversion_mapping, core_model_loading
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as library_logging

from engine.errors import CheckpointError
from engine.memory.checkpoint import Checkpoint
from engine.memory.layout import BUFFERS, Layout, lay_out
from engine.memory.source import SourceTensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The tensors of one group that the same source tensors make: read and written together.

    `is_renamed_only` says that the library changes nothing of the one source but its name.
    """

    names: tuple[str, ...]
    sources: Mapping[str, SourceTensor]
    is_renamed_only: bool


class Conversion:
    """Which source tensors make each group, and what comes of them.

    `dtype_of` has an entry for every parameter, and for those buffers that the source holds.
    Every parameter keeps the dtype of its source, so nothing is rounded.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: nn.Module) -> None:
        assert all(p.is_meta for p in skeleton.parameters()), "weights are bound after packing"
        self.checkpoint = checkpoint
        self.layout: Layout = lay_out(skeleton)
        self.dtype_of: dict[str, torch.dtype] = {}
        self._scratch: Any = copy.deepcopy(skeleton)
        self._tensors_of: dict[str, dict[str, torch.Tensor]] = {}
        self._sources_of: dict[str, dict[str, SourceTensor]] = {}
        self._converted: set[str] = set()  # names of what is more than renamed
        self._plan()
        self._require_complete(set(self.dtype_of))
        for name, parameter in self._scratch.named_parameters():
            parameter.data = parameter.data.to(self.dtype_of[name])
        state = self._scratch.state_dict()
        for name, group in self.layout.group_of.items():
            if name in self.dtype_of:
                meta = torch.empty(state[name].shape, dtype=self.dtype_of[name], device="meta")
                self._tensors_of.setdefault(group, {})[name] = meta

    def tensors_of(self, group: str) -> dict[str, torch.Tensor]:
        """Shapes and dtypes only (meta), in the order of the layout."""
        return self._tensors_of.get(group, {})

    def parts_of(self, group: str) -> tuple[Part, ...]:
        """The group's parts, in the order of their first tensors."""
        parts: list[tuple[set[str], dict[str, SourceTensor]]] = []
        order = list(self.tensors_of(group))
        for name in order:
            names, sources = {name}, dict(self._sources_of[name])
            for part in [part for part in parts if part[1].keys() & sources.keys()]:
                parts.remove(part)
                names, sources = part[0] | names, part[1] | sources
            parts.append((names, sources))
        made = [self._part(sorted(names, key=order.index), found) for names, found in parts]
        return tuple(sorted(made, key=lambda part: order.index(part.names[0])))

    def read(self, part: Part) -> dict[str, torch.Tensor]:
        """The part's values by the model's names. The caller drops them before the next part."""
        if part.is_renamed_only:
            return self._read_renamed(part)
        self._load(part)
        values = self._take_out(part)
        missing = set(part.names) - values.keys()
        if missing:
            raise CheckpointError(_missing_message(self.checkpoint, sorted(missing)))
        return values

    def _part(self, names: list[str], sources: dict[str, SourceTensor]) -> Part:
        return Part(
            names=tuple(names),
            sources=sources,
            is_renamed_only=len(names) == len(sources) == 1 and names[0] not in self._converted,
        )

    def _plan(self) -> None:
        """Ask the library for the name each source tensor will have; ignore what it ignores."""
        renamings, converters = _split(
            conversion_mapping.get_model_conversion_mapping(self._scratch)
        )
        targets_of = {p: c.target_patterns for c in converters for p in c.source_patterns}
        state = self._scratch.state_dict()
        for source_name, tensor in self.checkpoint.tensors.items():
            renamed, pattern = core_model_loading.rename_source_key(
                source_name, renamings, converters, self._scratch.base_model_prefix, state
            )
            if renamed not in state and source_name in state:
                renamed, pattern = source_name, None
            targets = targets_of[pattern] if pattern is not None else [""]
            for target in targets:
                name = self.layout.canonical.get(renamed.replace(targets[0], target))
                if name is None:
                    continue
                self._assign(source_name, tensor, name, state[name])
                if pattern is not None:
                    self._converted.add(name)

    def _assign(self, source_name: str, tensor: SourceTensor, name: str, empty: Any) -> None:
        self._sources_of.setdefault(name, {})[source_name] = tensor
        if self.layout.group_of[name] == BUFFERS:
            self.dtype_of[name] = empty.dtype  # the library loads buffers in the model's dtype
        else:
            before = self.dtype_of.get(name, tensor.dtype)
            self.dtype_of[name] = torch.promote_types(before, tensor.dtype)

    def _require_complete(self, known: set[str]) -> None:
        missing = [
            name
            for name, group in self.layout.group_of.items()
            if group != BUFFERS and name not in known
        ]
        if missing:
            raise CheckpointError(_missing_message(self.checkpoint, missing))

    def _read_renamed(self, part: Part) -> dict[str, torch.Tensor]:
        """Without the library's loader, which looks at the whole model at every call."""
        [name], [source] = part.names, part.sources.values()
        value = source[...]
        expected = self._tensors_of[self.layout.group_of[name]][name]
        if value.shape != expected.shape:
            raise self._mismatch(name, value.shape, expected.shape)
        return {name: value.to(expected.dtype)}

    def _load(self, part: Part) -> None:
        load_config = LoadStateDictConfig(
            weight_mapping=conversion_mapping.get_model_conversion_mapping(self._scratch)
        )
        with _quiet_library():
            info, _ = core_model_loading.convert_and_load_state_dict_in_model(
                model=self._scratch,
                state_dict=dict(part.sources),
                load_config=load_config,
            )
        if info.conversion_errors:
            name, reason = next(iter(info.conversion_errors.items()))
            raise CheckpointError(f"{self.checkpoint.source}: {name} is not convertible: {reason}")
        if info.mismatched_keys:
            raise self._mismatch(*min(info.mismatched_keys))

    def _mismatch(self, name: str, found: torch.Size, expected: torch.Size) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.source}: {name} has shape {tuple(found)}, the config asks for "
            f"{tuple(expected)}"
        )

    def _take_out(self, part: Part) -> dict[str, torch.Tensor]:
        """Collect what the loader made real and put meta tensors back in its place."""
        values: dict[str, torch.Tensor] = {}
        for alias, name in self.layout.canonical.items():
            if name not in part.names:
                continue
            path, _, leaf = alias.rpartition(".")
            module = self._scratch.get_submodule(path)
            value = getattr(module, leaf).detach()
            if value.is_meta:
                continue
            if name in values and not torch.equal(values[name], value):
                raise CheckpointError(
                    f"{self.checkpoint.source}: the config ties {alias} to {name}, but the two "
                    "differ in the files; its tie_word_embeddings should be false"
                )
            values[name] = value
            _put_back_meta(module, leaf, value)
        return values


def _put_back_meta(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
    empty = torch.empty_like(value, device="meta")
    if leaf in module._buffers:  # noqa: SLF001 - keeps the buffer's persistence
        module._buffers[leaf] = empty  # noqa: SLF001
    else:
        setattr(module, leaf, nn.Parameter(empty, requires_grad=False))


def _split(mapping: list[Any]) -> tuple[list[Any], list[Any]]:
    """Renamings and converters, as the library's loader parts them."""
    renamings = [m for m in mapping if isinstance(m, core_model_loading.WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, core_model_loading.WeightConverter)]
    return renamings, converters


def _missing_message(checkpoint: Checkpoint, missing: list[str]) -> str:
    return (
        f"{checkpoint.source} lacks {len(missing)} of the model's parameters: "
        f"{', '.join(missing[:3])}"
    )


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """No progress bar for each group."""
    was_enabled = library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            library_logging.enable_progress_bar()
