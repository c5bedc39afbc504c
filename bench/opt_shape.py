"""Sizes of the OPT-shaped models that the offloading benchmark for a GPU runs."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

_MAX_POSITIONS: Final = 2048
_POSITION_OFFSET: Final = 2  # OPT's table of positions begins with two that nobody uses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptShape:
    """Sizes of an OPT model: learned positions, biases, norms before, ReLU, a tied head."""

    layers: int
    hidden: int
    heads: int
    vocab: int = 50_272
    seed: int = 0

    @property
    def mlp(self) -> int:
        return 4 * self.hidden

    @property
    def name(self) -> str:
        return f"opt-{self.layers}x{self.hidden}-{self.vocab}-s{self.seed}"

    def checkpoint(self, cache: Path) -> Path:
        return cache / "models" / self.name

    @property
    def config(self) -> dict[str, Any]:
        """What the checkpoint's config.json says."""
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "torch_dtype": "bfloat16",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "word_embed_proj_dim": self.hidden,
            "ffn_dim": self.mlp,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": _MAX_POSITIONS,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the file."""
        start = "model.decoder"
        yield f"{start}.embed_tokens.weight", (self.vocab, self.hidden)
        yield (
            f"{start}.embed_positions.weight",
            (_MAX_POSITIONS + _POSITION_OFFSET, self.hidden),
        )
        for layer in range(self.layers):
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                yield from _linear(
                    f"{start}.layers.{layer}.self_attn.{name}", self.hidden, self.hidden
                )
            yield from _norm(f"{start}.layers.{layer}.self_attn_layer_norm", self.hidden)
            yield from _linear(f"{start}.layers.{layer}.fc1", self.mlp, self.hidden)
            yield from _linear(f"{start}.layers.{layer}.fc2", self.hidden, self.mlp)
            yield from _norm(f"{start}.layers.{layer}.final_layer_norm", self.hidden)
        yield from _norm(f"{start}.final_layer_norm", self.hidden)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


OPT_SHAPES: Final[Mapping[str, OptShape]] = MappingProxyType(
    {
        "tiny": OptShape(layers=2, hidden=64, heads=4, vocab=512),
        "6.7b": OptShape(layers=32, hidden=4096, heads=32),
        "30b": OptShape(layers=48, hidden=7168, heads=56),
    }
)
