"""A source checkpoint: what model it is, and its tensors, each read only when asked for.

A safetensors folder, a GGUF file, or a folder that holds exactly one. Knows the source's names;
the names of the model's parameters are the pack's affair.
"""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from engine.errors import CheckpointError, UnsupportedModelError
from engine.memory import gguf, safetensors
from engine.memory.architecture import require_supported
from engine.memory.source import SourceTensor

PACK_FORMAT: Final = 2  # part of the identity: raise it when packs are laid out otherwise


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened source. `tensors` are keyed by the names the library's loader takes.

    `identity` changes whenever a pack made of the source could. `stored_dtype` is the dtype most
    weight bytes have, float32 where GGUF blocks are unpacked. `eos_token_ids` are the config's and
    the generation config's; the tokenizer may know others.
    """

    source: Path
    config: Any  # transformers.PreTrainedConfig
    generation_config: Any | None  # transformers.GenerationConfig
    identity: str
    stored_dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    tensors: Mapping[str, SourceTensor]


def open_checkpoint(source: Path) -> Checkpoint:
    """Read headers and config, check that the files are whole, refuse what cannot be honoured."""
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    gguf_path = find_gguf(source)
    return _open_folder(source) if gguf_path is None else _open_gguf(source, gguf_path)


def find_gguf(source: Path) -> Path | None:
    """The GGUF file that `source` is or holds; None for a safetensors folder."""
    if source.is_file():
        return source
    if (source / safetensors.SINGLE_FILE).exists() or (source / safetensors.INDEX_FILE).exists():
        return None
    candidates = sorted(source.glob("*.gguf"))
    if len(candidates) > 1:
        raise CheckpointError(
            f"{source} holds {len(candidates)} .gguf files; name one: "
            f"{', '.join(path.name for path in candidates[:3])}"
        )
    return candidates[0] if candidates else None


def _open_folder(source: Path) -> Checkpoint:
    files = safetensors.weight_files(source)
    config = read_config(source)
    generation_config = None
    if (source / "generation_config.json").is_file():
        generation_config = transformers.GenerationConfig.from_pretrained(
            source, local_files_only=True
        )
    return _checkpoint(
        source=source,
        config=config,
        generation_config=generation_config,
        files=(source / "config.json", *files),
        tensors=safetensors.read_tensors(source),
    )


def _open_gguf(source: Path, path: Path) -> Checkpoint:
    file = gguf.read_gguf(path)
    config = gguf.read_config(file)
    require_supported(config)
    return _checkpoint(
        source=source,
        config=config,
        generation_config=None,
        files=(path,),
        tensors=gguf.read_tensors(file, config),
    )


def _checkpoint(
    *,
    source: Path,
    config: Any,
    generation_config: Any | None,
    files: tuple[Path, ...],
    tensors: Mapping[str, SourceTensor],
) -> Checkpoint:
    return Checkpoint(
        source=source,
        config=config,
        generation_config=generation_config,
        identity=_identity(source, files),
        stored_dtype=_commonest_dtype(source, tensors),
        eos_token_ids=_eos_token_ids(config.get_text_config(decoder=True), generation_config),
        tensors=tensors,
    )


def read_config(source: Path) -> Any:
    """The library's config of a folder, weights there or not. Raises CheckpointError,
    UnsupportedModelError.
    """
    path = source / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{source} holds no config.json")
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    model_type = fields.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model type {model_type!r} (architectures {fields.get('architectures')}) is unknown "
            f"to transformers {transformers.__version__}"
        )
    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    require_supported(config)
    return config


def _identity(source: Path, files: tuple[Path, ...]) -> str:
    """A readable start and a digest of all that decides a pack's bytes."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    facts = [PACK_FORMAT, transformers.__version__, stats]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    stem = re.sub(r"[^a-z0-9]+", "-", source.stem.lower()).strip("-")
    return f"{stem[:40]}-{digest[:24]}"


def _commonest_dtype(source: Path, tensors: Mapping[str, SourceTensor]) -> torch.dtype:
    bytes_by_dtype: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            bytes_by_dtype[tensor.dtype] += tensor.num_bytes
    if not bytes_by_dtype:
        raise CheckpointError(f"{source} holds no floating-point tensor among {len(tensors)}")
    return bytes_by_dtype.most_common(1)[0][0]


def _eos_token_ids(config: Any, generation_config: Any | None) -> tuple[int, ...]:
    """The generation config first: it is where chat models put their end-of-turn tokens."""
    found: dict[int, None] = {}
    for holder in (generation_config, config):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            found |= dict.fromkeys(ids if isinstance(ids, list | tuple) else [ids])
    return tuple(found)
