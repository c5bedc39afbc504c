"""What goes into the engine and what comes out: plain values, no torch, no wire format."""

import dataclasses
import enum
from collections.abc import Iterable
from pathlib import Path


class FinishReason(enum.StrEnum):
    """Why a row left the block."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    FAULT = "fault"  # its grammar could not be followed any further: the text is worth nothing


class GrammarKind(enum.StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    LARK = "lark"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What the whole of a row's text has to be. `text` is a JSON schema, or rules in Lark."""

    kind: GrammarKind
    text: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one row's tokens are chosen. A row's result depends on this and its prompt alone.

    `temperature` 0 is greedy. `seed` None is resolved by whoever makes the prompt: the engine
    never draws entropy of its own. Until `min_tokens` tokens exist, end-of-sequence and stop tokens
    are not sampled and stop strings are ordinary text; with `ignore_eos` so are end-of-sequence
    tokens at any time.

    `top_k` 0 is no limit. `min_p` is a share of the likeliest token's probability. `logit_bias` is
    (token id, what to add) pairs. Presence and frequency penalty are subtracted, for tokens that
    were generated; the repetition penalty divides, for those of the prompt too. `logprobs` asks for
    the log-probability of each generated token and of so many of the likeliest in its place.

    With a `grammar` only tokens that it allows are sampled; penalties, temperature and truncation
    see no others. The row ends as soon as the grammar can be continued by nothing, or with an
    end-of-sequence token where it may end.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    n: int = 1
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None

    def end_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """Tokens that end the row, of the model's own and of those asked for."""
        return frozenset((*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row to be, or `sampling.n`: `key` is the caller's and comes back on each completion.

    With `goes_first` its rows take places in the block before all waiting rows that lack it.
    """

    key: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    goes_first: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """A token's log-probability, and (token id, log-probability) of the likeliest in its place.

    All are of the model's own distribution, before bias, grammar, penalties, temperature and
    truncation.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished row. `token_ids` end before the token that ended it; `text` before the stop.

    `index` counts the completions of one prompt from 0. `logprobs`, where they were asked for, are
    one for each of `token_ids`. `num_generated` counts every sampled token, the one that ended the
    row among them. `num_cached_tokens` of the prompt were found computed, or computed by another row.
    """

    key: str
    index: int = 0
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_generated: int
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Hard byte limits of each tier, and where spilled and packed bytes may lie."""

    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    spill_dir: Path
