"""Tiny seeded random checkpoints of several model types, small enough to run beside an oracle."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

NUM_LAYERS: Final = 4
VOCAB_SIZE: Final = 256

_COMMON: Final = MappingProxyType(
    {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
)
_GROUPED: Final = MappingProxyType({**_COMMON, "num_key_value_heads": 2, "intermediate_size": 128})

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _opt() -> Any:
    return transformers.OPTConfig(
        **_COMMON, ffn_dim=128, word_embed_proj_dim=64, tie_word_embeddings=True
    )


def _llama() -> Any:
    return transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=False)


def _qwen3() -> Any:
    return transformers.Qwen3Config(**_GROUPED, head_dim=16, tie_word_embeddings=False)


def _gemma2() -> Any:
    return transformers.Gemma2Config(
        **_GROUPED, head_dim=16, sliding_window=8, query_pre_attn_scalar=16
    )


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=64,
        n_layer=NUM_LAYERS,
        n_head=4,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=1,
    )


def _mixtral() -> Any:
    return transformers.MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    )


# Tied or not as checkpoints of the type usually are: opt, gemma2 and gpt2 tie, the others do not.
TINY_MODELS: Final[Mapping[str, Callable[[], Any]]] = MappingProxyType(
    {
        "opt": _opt,
        "llama": _llama,
        "qwen3": _qwen3,
        "gemma2": _gemma2,
        "gpt2": _gpt2,
        "mixtral": _mixtral,
    }
)


def write_tiny_model(
    folder: Path,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_bytes: int | None = None,
) -> Path:
    """Write a safetensors checkpoint of `TINY_MODELS[name]` without a tokenizer; give the folder.

    Weights are wide enough apart that greedy tokens do not hang on rounding.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(TINY_MODELS[name]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.1)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    shard_size = 5 * 10**9 if max_shard_bytes is None else max_shard_bytes
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def write_tiny_tokenizer(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, without: str = '!"'
) -> Path:
    """A tokenizer of the 256 bytes, of which two, `without`, are given up for bos and eos."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(without))
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
    }
    written = {key: value for key, value in fields.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return folder
