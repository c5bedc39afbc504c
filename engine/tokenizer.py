"""Text to token ids and back, with the checkpoint's own tokenizer. Knows no weights.

Everything is read from local files. A checkpoint without tokenizer files still serves prompts that
are token ids: `Tokenizer.load` then gives a `TokenIdsOnly`.
"""

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from llguidance import LLTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import ChatTemplateError, CheckpointError, TokenizerError

_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
)


class Tokenizer:
    """A loaded tokenizer. `vocab_size` bounds the ids the model takes, `eos_token_ids` end a row."""

    def __init__(
        self, backend: Any, *, vocab_size: int | None = None, eos_token_ids: tuple[int, ...] = ()
    ) -> None:
        self._backend = backend
        self.vocab_size: int = len(backend) if vocab_size is None else vocab_size
        own = () if backend.eos_token_id is None else (backend.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *eos_token_ids)))

    @classmethod
    def load(cls, source: Path) -> "Tokenizer":
        """From a checkpoint folder, a GGUF file, or a folder that holds exactly one."""
        if source.is_file():
            return _load_gguf(source)
        if any((source / name).is_file() for name in _TOKENIZER_FILES):
            return _load_folder(source)
        files = sorted(source.glob("*.gguf"))
        return _load_gguf(files[0]) if len(files) == 1 else TokenIdsOnly(source)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._backend.chat_template)

    @property
    def num_tokens(self) -> int:
        """Of the tokenizer itself: fewer than the model takes, where its table was padded."""
        return len(self._backend)

    @property
    def chat_template(self) -> str:
        """Its text, or that of the one meant for tools; empty without one."""
        template = self._backend.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default")
        return template or ""

    def serialized(self) -> str:
        """As a tokenizer.json. Raises TokenizerError for one that is not of that kind."""
        if not isinstance(self._backend, PreTrainedTokenizerFast):
            name = type(self._backend).__name__
            raise TokenizerError(f"{name} has no tokenizer.json to read its tokens from")
        backend = copy.deepcopy(self._backend.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        text: str = backend.to_str()
        return text

    def special_token_id(self, text: str) -> int | None:
        """None for a text that is no special token, one that is a token like others included."""
        for token_id, token in self._backend.added_tokens_decoder.items():
            if token.special and token.content == text:
                return int(token_id)
        return None

    def token_bytes(self, token_id: int) -> bytes:
        """What the token is of a text, alone; of half a character, half its bytes."""
        if token_id >= self.num_tokens:
            return b""  # the model's table is longer than the tokenizer's
        found: bytes = self._bytes_of_tokens.decode_bytes([token_id])
        return found

    @functools.cached_property
    def _bytes_of_tokens(self) -> LLTokenizer:
        return LLTokenizer(self.serialized())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With `add_special_tokens`, what the tokenizer itself puts around plain text (often bos)."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, ValueError) as error:  # a lone surrogate is no text
            raise TokenizerError(f"the text cannot be tokenised: {error}") from error
        return ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """The messages through the checkpoint's own template, up to where the answer begins."""
        if not self.has_chat_template:
            raise ChatTemplateError("the model has no chat template: send text or token ids")
        try:
            ids: list[int] = self._backend.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise ChatTemplateError(f"the chat template refuses the messages: {error}") from error
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """No spaces are tidied away."""
        text: str = self._backend.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text


class TokenIdsOnly(Tokenizer):
    """For a checkpoint without tokenizer files: ids in, ids out as decimals with spaces between."""

    def __init__(self, source: Path) -> None:
        config = _read_json(source / "config.json")
        text_config = config.get("text_config") or config
        if "vocab_size" not in text_config:
            raise CheckpointError(f"{source / 'config.json'} names no vocab_size")
        self._source = source
        self.vocab_size = int(text_config["vocab_size"])
        self.eos_token_ids = _eos_token_ids(source)

    @property
    def has_chat_template(self) -> bool:
        return False

    @property
    def num_tokens(self) -> int:
        return self.vocab_size

    @property
    def chat_template(self) -> str:
        return ""

    def serialized(self) -> str:
        raise TokenizerError(f"{self._source} holds no tokenizer: text means nothing to it")

    def special_token_id(self, text: str) -> int | None:
        return None

    def token_bytes(self, token_id: int) -> bytes:
        return str(token_id).encode()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise TokenizerError(f"{self._source} holds no tokenizer: send the prompt as token ids")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return " ".join(str(token_id) for token_id in token_ids)


def _load_folder(source: Path) -> Tokenizer:
    try:
        backend = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{source} holds no readable tokenizer: {error}") from error
    config = _read_json(source / "config.json") if (source / "config.json").is_file() else {}
    return Tokenizer(
        backend,
        vocab_size=(config.get("text_config") or config).get("vocab_size"),
        eos_token_ids=_eos_token_ids(source),
    )


def _load_gguf(path: Path) -> Tokenizer:
    try:
        backend = PreTrainedTokenizerFast.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
    except (OSError, ValueError, KeyError, IndexError, ImportError) as error:
        raise CheckpointError(f"{path} holds no readable tokenizer: {error}") from error
    return Tokenizer(backend)


def _eos_token_ids(source: Path) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        path = source / name
        ids = _read_json(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            found |= dict.fromkeys(ids if isinstance(ids, list) else [ids])
    return tuple(found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or not JSON: {error}") from error
    return fields
