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

    With `max_tokens` 0 nothing is sampled at all: the row ends when its prompt has been computed.
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
class Scoring:
    """Of each prompt token but the first: its log-probability, and so many of the likeliest."""

    num_top: int = 0


class Pooling(enum.StrEnum):
    """Which of a prompt's hidden states, after the final norm, become its embedding."""

    LAST = "last"  # the last token's, as models trained to embed are used
    MEAN = "mean"  # all of them alike


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """A vector of length 1 of the whole prompt: of `dimensions` the first, None for all."""

    pooling: Pooling = Pooling.LAST
    dimensions: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row to be, or `sampling.n`: `key` is the caller's and comes back on each completion.

    `reading` is what is wanted of the prompt itself, beside what `sampling` generates.
    With `goes_first` its rows take places in the block before all waiting rows that lack it.
    """

    key: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    reading: Scoring | Embedding | None = None
    goes_first: bool = False

    @property
    def read_positions(self) -> range:
        """Of the tokens whose hidden states are read. What is said of a token is known before it:
        the last token's state says nothing of the prompt.
        """
        end = len(self.token_ids)
        if self.reading is None:
            return range(0)
        if isinstance(self.reading, Scoring):
            return range(end - 1)
        return range(end - 1 if self.reading.pooling is Pooling.LAST else 0, end)

    @property
    def sharable_token_ids(self) -> tuple[int, ...]:
        """Leading tokens whose keys and values may be another row's work: none that is read, and
        not the last, which has to be computed to go on from there.
        """
        read = self.read_positions
        return self.token_ids[: read.start if read else -1]


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
    `end_logprobs` are of the token that ended it, if that is none of `token_ids`.

    What the prompt's `reading` asked for comes with the completion of index 0: `prompt_logprobs`, one
    for each prompt token after the first, or the `embedding`, float32 with the lowest byte first.
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
    end_logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    embedding: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Hard byte limits of each tier, and where spilled and packed bytes may lie."""

    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    spill_dir: Path
