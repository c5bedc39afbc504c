"""What goes into the engine and what comes out: plain values, no torch, no wire format."""

import dataclasses
import enum
from pathlib import Path


class FinishReason(enum.StrEnum):
    """Why a row left the block."""

    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens or the model's context


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one row's tokens are chosen. A row's result depends on this and its prompt alone.

    `temperature` 0 is greedy. `seed` None is resolved by whoever makes the prompt: the engine
    never draws entropy of its own. Until `min_tokens` tokens exist, end-of-sequence tokens are
    not sampled and stop strings are ordinary text; with `ignore_eos` so are end-of-sequence tokens.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row to be: `key` is the caller's and comes back unchanged on the completion."""

    key: str
    token_ids: tuple[int, ...]
    sampling: Sampling


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished row. `token_ids` end before the end-of-sequence token; `text` before the stop.

    `num_generated` counts every sampled token, the end-of-sequence token among them.
    """

    key: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_generated: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Hard byte limits of each tier, and where spilled and packed bytes may lie."""

    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    spill_dir: Path
