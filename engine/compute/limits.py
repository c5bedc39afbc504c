"""What a prompt may ask of sampling, each limit under its name on the wire; knows no logits."""

import dataclasses
import math
from collections.abc import Collection
from typing import Final

from engine.compute.head import Head
from engine.config import Embedding, Sampling, Scoring
from engine.errors import PromptError, UnsupportedModelError

MAX_COMPLETIONS: Final = 128
MAX_TOP_LOGPROBS: Final = 20
_MAX_BIAS: Final = 100

_DECIMALS: Final[tuple[tuple[str, float, float], ...]] = (
    ("temperature", 0, math.inf),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0.01, 100),  # a float32 logit comes through both
)


def check_sampling(sampling: Sampling, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
    """Raises PromptError for the first setting that is out of its range."""
    _check_integer("max_tokens", sampling.max_tokens, 0, None)
    _check_integer("min_tokens", sampling.min_tokens, 0, sampling.max_tokens)
    _check_integer("n", sampling.n, 1, MAX_COMPLETIONS)
    _check_integer("top_k", sampling.top_k, 0, None)
    _check_integer("top_logprobs", sampling.logprobs or 0, 0, MAX_TOP_LOGPROBS)
    for name, low, high in _DECIMALS:
        _check_decimal(name, getattr(sampling, name), low, high)
    for token_id, bias in sampling.logit_bias:
        _check_token(token_id, "logit_bias", vocab_size)
        _check_decimal("logit_bias", bias, -_MAX_BIAS, _MAX_BIAS)
    if "" in sampling.stop:
        raise _refused("stop", "empty strings are not allowed", code="invalid_value")
    for token_id in sampling.stop_token_ids:
        _check_token(token_id, "stop_token_ids", vocab_size)
    _check_one_can_follow(sampling, vocab_size, eos_token_ids)
    if sampling.grammar is not None:
        _check_beside_grammar(sampling, eos_token_ids)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Readable:
    """What can be read of a model's prompts: embeddings of `hidden_size`, None for nothing at all;
    and scores, unless there is a fault in that.
    """

    hidden_size: int | None
    scoring_fault: str | None = None


def readable_of(head: Head | None) -> Readable:
    """Holds nothing of the head."""
    if head is None:
        return Readable(hidden_size=None)
    is_faulty = isinstance(head.tail, UnsupportedModelError)
    return Readable(
        hidden_size=head.hidden_size, scoring_fault=str(head.tail) if is_faulty else None
    )


def check_reading(reading: Scoring | Embedding | None, readable: Readable) -> None:
    """Raises PromptError for what cannot be read of a prompt, or not of this model."""
    if reading is None:
        return
    if readable.hidden_size is None:
        raise _unreadable("its head is no plain matrix")
    if isinstance(reading, Embedding):
        if reading.dimensions is not None:
            _check_integer("dimensions", reading.dimensions, 1, readable.hidden_size)
        return
    _check_integer("logprobs", reading.num_top, 0, MAX_TOP_LOGPROBS)
    if readable.scoring_fault is not None:
        raise _unreadable(readable.scoring_fault)


def _unreadable(fault: str) -> PromptError:
    message = f"Prompts of this model can be neither scored nor embedded: {fault}."
    return PromptError(message, code="unsupported_parameter", param="model")


def _check_beside_grammar(sampling: Sampling, eos_token_ids: Collection[int]) -> None:
    """Where a grammar can only end, an end has to be among the tokens."""
    for param, asked in (("ignore_eos", sampling.ignore_eos), ("min_tokens", sampling.min_tokens)):
        if asked:
            raise _refused(param, "a constrained text ends where it is whole", code="invalid_value")
    if not eos_token_ids:
        raise _refused(
            "response_format", "the model has no token that ends a text", code="invalid_value"
        )


def _check_one_can_follow(
    sampling: Sampling, vocab_size: int, eos_token_ids: Collection[int]
) -> None:
    """Before `min_tokens` there has to be a token that ends nothing."""
    ends = sampling.end_token_ids(eos_token_ids)
    if sampling.min_tokens and len(ends) >= vocab_size:
        raise _refused(
            "stop_token_ids",
            f"with 'min_tokens' {sampling.min_tokens} there has to be a token that does not end "
            f"the completion, but {len(ends)} of {vocab_size} do",
            code="invalid_value",
        )


def _check_token(token_id: int, param: str, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise _refused(
            param,
            f"token id {token_id} is not in the vocabulary of {vocab_size} tokens",
            code="invalid_value",
        )


def _check_integer(param: str, value: int, low: int, high: int | None) -> None:
    if value < low:
        raise _below(param, low, value, kind="integer")
    if high is not None and value > high:
        raise _above(param, high, value, kind="integer")


def _check_decimal(param: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value):
        raise _refused(param, f"expected a finite number, but got {value}", code="invalid_value")
    if value < low:
        raise _below(param, low, value, kind="decimal")
    if value > high:
        raise _above(param, high, value, kind="decimal")


def _below(param: str, low: float, value: float, *, kind: str) -> PromptError:
    fault = f"{kind} below minimum value. Expected a value >= {low}, but got {value} instead"
    return _refused(param, fault, code=f"{kind}_below_min_value")


def _above(param: str, high: float, value: float, *, kind: str) -> PromptError:
    fault = f"{kind} above maximum value. Expected a value <= {high}, but got {value} instead"
    return _refused(param, fault, code=f"{kind}_above_max_value")


def _refused(param: str, fault: str, *, code: str) -> PromptError:
    return PromptError(f"Invalid '{param}': {fault}.", code=code, param=param)
