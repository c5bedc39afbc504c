"""Sizes of the Llama-shaped model that the offloading benchmark runs, and where its files lie."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, Self

HalfType = Literal["f16", "bf16"]

MAX_POSITIONS: Final = 131_072
ROPE_THETA: Final = 500_000.0
NORM_EPSILON: Final = 1e-5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama model whose head is tied to its embedding."""

    layers: int = 16
    hidden: int = 2048
    mlp: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128_256
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """What the checkpoint's config.json says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_theta": ROPE_THETA,
            "rms_norm_eps": NORM_EPSILON,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def name(self) -> str:
        return f"llama-{self.layers}x{self.hidden}-{self.mlp}-{self.vocab}-s{self.seed}"

    def checkpoint(self, cache: Path) -> Path:
        return cache / "models" / self.name

    def gguf(self, cache: Path, half: HalfType) -> Path:
        # Beside the folder: a GGUF file inside would make it another checkpoint.
        return cache / "models" / f"{self.name}-{half}.gguf"

    def as_arguments(self) -> list[str]:
        """What `add_shape_arguments` and `from_arguments` read this shape from."""
        fields = dataclasses.asdict(self)
        return [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the file."""
        kv_width = self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            start = f"model.layers.{layer}"
            yield f"{start}.input_layernorm.weight", (self.hidden,)
            yield f"{start}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{start}.self_attn.k_proj.weight", (kv_width, self.hidden)
            yield f"{start}.self_attn.v_proj.weight", (kv_width, self.hidden)
            yield f"{start}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{start}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{start}.mlp.gate_proj.weight", (self.mlp, self.hidden)
            yield f"{start}.mlp.up_proj.weight", (self.mlp, self.hidden)
            yield f"{start}.mlp.down_proj.weight", (self.hidden, self.mlp)
        yield "model.norm.weight", (self.hidden,)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Self:
        return cls(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(cls)})


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(LlamaShape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
