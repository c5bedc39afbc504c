"""A checkpoint's context is read from its header, and a header that does not tell is refused."""

import json
import struct
from pathlib import Path

import pytest

from engine.errors import CheckpointError
from worker.context_length import max_context_tokens


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf(key: str) -> bytes:
    fields = [
        _string("general.architecture") + struct.pack("<I", 8) + _string("llama"),
        _string("tokenizer.ggml.tokens")
        + struct.pack("<IIQ", 9, 8, 2)
        + _string("a")
        + _string("bc"),
        _string(key) + struct.pack("<II", 4, 2048),
    ]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields)


def test_a_gguf_file_tells(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(_gguf("llama.context_length"))
    assert max_context_tokens(path) == max_context_tokens(tmp_path) == 2048


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 7,
}


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
DYNAMIC = {
    "rope_type": "dynamic",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 7,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2", "n_positions": 9}, 9),
        ({"model_type": "llama", "max_position_embeddings": 9}, 9),
        ({"model_type": "llama"}, 2048),  # the library's own default
        (
            {
                "model_type": "phi3",
                "hidden_size": 64,
                "num_attention_heads": 4,
                "max_position_embeddings": 9,
                "original_max_position_embeddings": 7,
                "rope_parameters": LONG_ROPE,
            },
            7,
        ),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 9,
                "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN},
            },
            7,
        ),
    ],
    ids=["gpt2", "llama", "left out", "long rope", "one kind of layer"],
)
def test_a_config_tells(config: dict[str, object], expected: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert max_context_tokens(tmp_path) == expected


@pytest.mark.parametrize("content", [b"", b"GGUF", b"other", _gguf("llama.block_count")])
def test_a_file_that_does_not_tell_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError):
        max_context_tokens(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config"):
        max_context_tokens(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        max_context_tokens(tmp_path)
