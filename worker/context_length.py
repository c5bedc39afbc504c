"""How long a checkpoint's context is, from its header alone: no weights, no torch."""

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO, Final

from engine.errors import CheckpointError

_CONFIG_KEYS: Final = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_GGUF_MAGIC: Final = b"GGUF"
_GGUF_KEY: Final = ".context_length"
_GGUF_FORMATS: Final = ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")
_GGUF_STRING: Final = 8
_GGUF_ARRAY: Final = 9


def max_context_tokens(path: Path) -> int:
    """Raises CheckpointError if the checkpoint does not tell."""
    if (path / "config.json").is_file():
        return _from_config(path / "config.json")
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"{path} holds no config.json and {len(files)} GGUF files")
    return _from_gguf(files[0])


def _from_config(path: Path) -> int:
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    text = fields.get("text_config") or fields
    for key in _CONFIG_KEYS:
        if isinstance(text.get(key), int):
            return int(text[key])
    raise CheckpointError(f"{path} does not say how long the context is: no {_CONFIG_KEYS[0]}")


def _from_gguf(path: Path) -> int:
    try:
        with path.open("rb") as stream:
            found = _find_context_length(stream)
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise CheckpointError(f"{path} is no readable GGUF file: {error}") from error
    if found is None:
        raise CheckpointError(f"{path} does not say how long the context is: no *{_GGUF_KEY}")
    return found


def _find_context_length(stream: BinaryIO) -> int | None:
    if stream.read(4) != _GGUF_MAGIC:
        raise struct.error("it does not begin with GGUF")
    _version, _num_tensors, num_fields = struct.unpack("<IQQ", stream.read(20))
    for _ in range(num_fields):
        key = _read_string(stream).decode()
        value = _read_value(stream, _read(stream, "I"))
        if key.endswith(_GGUF_KEY):
            return int(value)
    return None


def _read_value(stream: BinaryIO, kind: int) -> Any:
    if kind == _GGUF_STRING:
        return _read_string(stream)
    if kind == _GGUF_ARRAY:
        item_kind, length = _read(stream, "I"), _read(stream, "Q")
        for _ in range(length):
            _read_value(stream, item_kind)
        return None
    return _read(stream, _GGUF_FORMATS[kind])


def _read_string(stream: BinaryIO) -> bytes:
    length: int = _read(stream, "Q")
    return stream.read(length)


def _read(stream: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", stream.read(struct.calcsize(f"<{kind}")))[0]
