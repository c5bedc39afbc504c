"""Bodies of request lines: what a line asks of its endpoint, in the wire's words.

Whatever cannot be honoured is refused by name, never silently ignored: `jobs.parameters` says what.
Knows no tokens and no engine; the answers' bodies are in `jobs.answers`.
"""

import dataclasses
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, Final

from jobs.batch import Endpoint
from jobs.embeddings import EmbeddingAsk, parse_embedding_ask
from jobs.formats import parse_format
from jobs.messages import parse_messages
from jobs.parameters import require_supported
from jobs.prompts import PromptText, parse_prompts, token_ids
from jobs.responses import parse_response_ask
from jobs.tools import ToolUse, parse_tool_use
from jobs.values import (
    above_length,
    boolean,
    integer,
    invalid_value,
    number,
    unicode_text,
    wrong_type,
)

MAX_STOPS: Final = 4
MAX_CHOICES: Final = 128
MAX_BEST_OF: Final = 20
DEFAULT_COMPLETION_TOKENS: Final = 16
_MAX_CHAT_LOGPROBS: Final = 20
_MAX_TEXT_LOGPROBS: Final = 5
_MAX_STOP_TOKENS: Final = 128
_MAX_BIASES: Final = 1024
_TOKEN_ID: Final = re.compile(r"\d{1,9}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One line's request, checked and with its defaults; `max_tokens` None is all that fits, 0 none:
    then prompts are only scored or embedded.

    Either `messages` or `prompts` is set; `param` and `schema_param` name where text and schema came
    from. Of `best_of` texts for a prompt the `n` likeliest are
    answered, by their tokens' mean log-probability. `logprobs` is how many of the likeliest tokens are told
    beside each, those of an echoed prompt too, None for no log-probabilities. `schema` is a JSON schema that the text has to fit.
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    prompts: tuple[PromptText, ...] = ()
    param: str = "prompt"
    max_tokens: int | None = None
    n: int = 1
    best_of: int | None = None
    echo: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    schema: Mapping[str, Any] | None = None
    schema_param: str = "response_format"
    tool_use: ToolUse | None = None
    embedding: EmbeddingAsk | None = None
    echoed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the answer repeats of the request."""

    @property
    def num_texts(self) -> int:
        """How many are generated for each prompt. Empty ones are all alike: one is enough."""
        return 1 if self.max_tokens == 0 else self.best_of or self.n

    @property
    def scores_prompts(self) -> bool:
        return self.echo and self.logprobs is not None


def parse_body(body: Mapping[str, Any], endpoint: Endpoint) -> Ask:
    """Raises InvalidRequestError with the first fault: its words, parameter and code."""
    require_supported(body, endpoint)
    given = {name: value for name, value in body.items() if value is not None}
    return Ask(**_OWN[endpoint](given), **_sampling(given))


def _chat(given: Mapping[str, Any]) -> dict[str, Any]:
    schema, tool_use = parse_format(given.get("response_format")), parse_tool_use(given)
    if schema is not None and tool_use is not None:
        raise invalid_value("response_format", "a schema does not go with tools that may be called")
    return {
        "messages": parse_messages(given.get("messages")),
        "param": "messages",
        "max_tokens": _max_chat_tokens(given),
        "logprobs": _chat_logprobs(given),
        "schema": schema,
        "tool_use": tool_use,
    }


def _completion(given: Mapping[str, Any]) -> dict[str, Any]:
    max_tokens = integer(given, "max_tokens", low=0)
    return {
        "echo": boolean(given, "echo"),
        "prompts": parse_prompts(given.get("prompt"), "prompt"),
        "max_tokens": DEFAULT_COMPLETION_TOKENS if max_tokens is None else max_tokens,
        "logprobs": integer(given, "logprobs", low=0, high=_MAX_TEXT_LOGPROBS),
        "best_of": _best_of(given),
    }


_OWN: Final[Mapping[Endpoint, Callable[[Mapping[str, Any]], dict[str, Any]]]] = (
    types.MappingProxyType(
        {
            Endpoint.CHAT_COMPLETIONS: _chat,
            Endpoint.COMPLETIONS: _completion,
            Endpoint.EMBEDDINGS: parse_embedding_ask,
            Endpoint.RESPONSES: parse_response_ask,
        }
    )
)
"""What of a body is one endpoint's alone, as fields of an Ask."""


def _best_of(given: Mapping[str, Any]) -> int | None:
    """None where there is nothing to choose."""
    best_of = integer(given, "best_of", low=1, high=MAX_BEST_OF)
    num_choices = _at_least_one(given, "n", high=MAX_CHOICES)
    if best_of is not None and best_of < num_choices:
        raise invalid_value(
            "best_of", f"{best_of} texts are fewer than 'n', which is {num_choices}"
        )
    return None if best_of == num_choices else best_of


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n": _at_least_one(given, "n", high=MAX_CHOICES),
        "temperature": number(given, "temperature", default=1.0, high=2),
        "top_p": number(given, "top_p", default=1.0, high=1),
        "top_k": integer(given, "top_k", low=0) or 0,
        "min_p": number(given, "min_p", default=0.0, high=1),
        "frequency_penalty": number(given, "frequency_penalty", default=0.0, low=-2, high=2),
        "presence_penalty": number(given, "presence_penalty", default=0.0, low=-2, high=2),
        "repetition_penalty": number(given, "repetition_penalty", default=1.0, low=0.01, high=100),
        "logit_bias": _logit_bias(given.get("logit_bias", {})),
        "seed": integer(given, "seed", low=-(2**63), high=2**63 - 1),
        "min_tokens": integer(given, "min_tokens", low=0) or 0,
        "stop": _stop(given.get("stop", [])),
        "stop_token_ids": _stop_token_ids(given.get("stop_token_ids", [])),
        "ignore_eos": boolean(given, "ignore_eos"),
    }


def _at_least_one(given: Mapping[str, Any], name: str, *, high: int) -> int:
    found = integer(given, name, low=1, high=high)
    return 1 if found is None else found


def _max_chat_tokens(given: Mapping[str, Any]) -> int | None:
    old = integer(given, "max_tokens", low=1)
    new = integer(given, "max_completion_tokens", low=1)
    if old is not None and new is not None and old != new:
        raise invalid_value(
            "max_tokens",
            f"{old} differs from 'max_completion_tokens', which is {new}: give one of them",
        )
    return new if new is not None else old


def _chat_logprobs(given: Mapping[str, Any]) -> int | None:
    asked = boolean(given, "logprobs")
    num_top = integer(given, "top_logprobs", low=0, high=_MAX_CHAT_LOGPROBS)
    if num_top and not asked:
        raise invalid_value("top_logprobs", "it needs 'logprobs' to be true")
    return (num_top or 0) if asked else None


def _logit_bias(bias: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(bias, dict):
        raise wrong_type("logit_bias", "an object of token ids and numbers", bias)
    if len(bias) > _MAX_BIASES:
        raise above_length("logit_bias", _MAX_BIASES, len(bias), kind="array")
    for token_id in bias:
        if not _TOKEN_ID.fullmatch(token_id):
            raise invalid_value("logit_bias", "its keys are token ids, as decimal strings")
    named = {f"logit_bias.{token_id}": value for token_id, value in bias.items()}
    values = [number(named, name, default=0.0, low=-100, high=100) for name in named]
    return tuple(dict(zip(map(int, bias), values, strict=True)).items())


def _stop(stop: object) -> tuple[str, ...]:
    if isinstance(stop, str):
        return (_stop_text(stop, "stop"),)
    if not isinstance(stop, list):
        raise wrong_type("stop", "a string or an array of strings", stop)
    if len(stop) > MAX_STOPS:
        raise above_length("stop", MAX_STOPS, len(stop), kind="array")
    return tuple(_stop_text(item, f"stop[{index}]") for index, item in enumerate(stop))


def _stop_text(text: object, place: str) -> str:
    if not isinstance(text, str):
        raise wrong_type(place, "a string", text)
    if not text:
        raise invalid_value(place, "empty strings are not allowed")
    return unicode_text(text, place)


def _stop_token_ids(items: object) -> tuple[int, ...]:
    if not isinstance(items, list):
        raise wrong_type("stop_token_ids", "an array of integers", items)
    if len(items) > _MAX_STOP_TOKENS:
        raise above_length("stop_token_ids", _MAX_STOP_TOKENS, len(items), kind="array")
    return token_ids(items, "stop_token_ids")
