"""The tensors of a safetensors folder, single or sharded. Reads headers only; knows no model."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from engine.errors import CheckpointError
from engine.memory.source import SourceTensor

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights: the single file if there is one, else the index's shards."""
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(
            f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} nor a .gguf file"
        )
    shards = tuple(folder / name for name in sorted(set(_weight_map(index).values())))
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:3])}"
        )
    return shards


def read_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Every tensor of the folder by its name in the files."""
    tensors: dict[str, SourceTensor] = {}
    for path in weight_files(folder):
        tensors |= _read_file(path)
    if not (folder / SINGLE_FILE).is_file():
        promised = _weight_map(folder / INDEX_FILE)
        missing = sorted(promised.keys() - tensors.keys())
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(promised)} indexed tensors are in no shard: "
                f"{', '.join(missing[:3])}"
            )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from error
    return weight_map


def _read_file(path: Path) -> dict[str, SourceTensor]:
    file_bytes = path.stat().st_size
    header, data_start = _read_header(path, file_bytes)
    header.pop("__metadata__", None)
    end_bytes = data_start + max((e["data_offsets"][1] for e in header.values()), default=0)
    if end_bytes > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header names {end_bytes} bytes, the file has {file_bytes}"
        )
    return {name: _tensor(path, name, entry, data_start) for name, entry in header.items()}


def _read_header(path: Path, file_bytes: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < header_bytes <= file_bytes - 8:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: a header of {header_bytes} bytes "
                f"in a file of {file_bytes}"
            )
        try:
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        except ValueError as error:
            raise CheckpointError(f"{path} has a damaged header: {error}") from error
    return header, 8 + header_bytes


def _tensor(path: Path, name: str, entry: dict[str, Any], data_start: int) -> SourceTensor:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {entry['dtype']}")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {shape} needs {math.prod(shape) * dtype.itemsize} "
            f"bytes, its header gives {end - begin}"
        )
    return SourceTensor(
        path=path,
        offset_bytes=data_start + begin,
        num_bytes=end - begin,
        shape=shape,
        dtype=dtype,
    )
