"""What the planner is held to: seeded models, jobs, and budgets by how far weights outgrow them."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
import transformers

from bench.workloads import WORKLOADS, Request, Sizes
from engine.config import Prompt, Sampling
from engine.planning import workload as planning
from engine.planning.cost import peak_bytes
from engine.planning.load import kept_tokens
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape, total_bytes

VOCAB_SIZE: Final = 4096
RATIOS: Final = (0.5, 1.2, 2.0, 4.0)
_STORED: Final = (torch.float32, torch.bfloat16)
_JOBS: Final = ("uniform", "ragged")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large models and jobs are."""

    layers: int
    hidden: int
    sizes: Sizes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration. `ratio`: bytes of weights over what the budget leaves for weights."""

    model: str
    stored: torch.dtype
    ratio: float
    job: str

    @property
    def stored_name(self) -> str:
        return str(self.stored).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.model} {self.stored_name}, ratio {self.ratio:g}, {self.job}"


def cases() -> list[Case]:
    """Every model at every ratio with both jobs; stored dtypes alternate so that all pairs occur."""
    return [
        Case(model=model, stored=_STORED[(which + at) % 2], ratio=ratio, job=job)
        for which, model in enumerate(MODELS)
        for at, ratio in enumerate(RATIOS)
        for job in _JOBS
    ]


def spread_out(found: Sequence[Case], count: int) -> list[Case]:
    """So many of them, of unlike models, ratios and jobs as far as there are."""
    count = min(count, len(found))
    step = len(found) / max(1, count)
    places = [int((at + (at + 1) / (count + 1)) * step) for at in range(count)]
    # Jobs alternate in `cases`: of every second place the other one is taken, if it stays its own.
    return [found[place ^ 1 if at % 2 and step >= 2 else place] for at, place in enumerate(places)]


def _llama(scale: Scale) -> Any:
    return transformers.LlamaConfig(
        **_common(scale), intermediate_size=3 * scale.hidden, num_key_value_heads=2
    )


def _opt(scale: Scale) -> Any:
    return transformers.OPTConfig(
        **_common(scale), ffn_dim=4 * scale.hidden, word_embed_proj_dim=scale.hidden
    )


def _mixtral(scale: Scale) -> Any:
    return transformers.MixtralConfig(
        **(_common(scale) | {"tie_word_embeddings": False}),
        intermediate_size=scale.hidden,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def _common(scale: Scale) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": scale.hidden,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.hidden // 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


MODELS: Final[Mapping[str, Callable[[Scale], Any]]] = MappingProxyType(
    {"llama": _llama, "opt": _opt, "mixtral": _mixtral}
)


def write_model(cache: Path, case: Case, scale: Scale, *, seed: int) -> Path:
    """Of seeded weights; nothing is written where it lies already."""
    name = f"{case.model}-{scale.layers}x{scale.hidden}-{case.stored_name}-s{seed}"
    folder = cache / "models" / name
    if not (folder / "config.json").exists():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(MODELS[case.model](scale))
        partial = folder.with_name(f"{name}.part")
        model.to(case.stored).save_pretrained(partial)
        partial.rename(folder)
    return folder


def requests_of(case: Case, sizes: Sizes) -> tuple[Request, ...]:
    return WORKLOADS[case.job](sizes, VOCAB_SIZE).requests


def prompts_of(requests: Sequence[Request]) -> list[Prompt]:
    """That generate exactly as many tokens as they may."""
    return [
        Prompt(
            key=each.key,
            token_ids=each.token_ids,
            sampling=Sampling(max_tokens=each.max_tokens, ignore_eos=True),
        )
        for each in requests
    ]


def host_budget_bytes(shape: ModelShape, work: planning.Workload, ratio: float) -> int:
    """The weights' bytes over `ratio`, and beside them what a block of half of the job's rows takes
    whatever is resident: what is fixed, activations, two slots of a whole layer, keys and values.
    """
    rows = max(1, work.num_rows // 2)
    tokens = rows + max(64, round(rows * work.prompt_tokens_per_output))
    kv_tokens = max(work.longest_tokens + 16, round(kept_tokens(work, rows=rows)))
    streamed = Policy(
        compute=Tier.CPU,
        compute_dtype=shape.compute_dtype,
        block_rows=rows,
        sweep_tokens=tokens - rows,
        micro_batch_tokens=tokens,
        kv=Split.on(Tier.CPU, kv_tokens * shape.kv_bytes_per_token),
        layer_splits=tuple(Split.on(Tier.DISK, each) for each in shape.layer_bytes),
        embedding_split=Split.on(Tier.DISK, shape.embedding.num_bytes) if shape.embedding else None,
        reason="all layers streamed",
    )
    # The head counts as weights: its slots would be larger than those of layers this small.
    beside = peak_bytes(shape, streamed)[Tier.CPU] - total_bytes(shape.head_tensors)
    return beside + round(weight_bytes(shape) / ratio)


def weight_bytes(shape: ModelShape) -> int:
    """Of all that can be placed, as stored."""
    parts = itertools.chain(shape.layers, (shape.head_tensors, shape.embedding_tensors))
    return sum(map(total_bytes, parts))
