"""Which parameters a line's body may have, and what becomes of each: one table for each endpoint.

Nothing is ignored silently: what cannot be honoured is refused by name. `docs/api-bodies.md` is made
from these tables.
"""

import dataclasses
import enum
import types
from collections.abc import Mapping, Sequence
from typing import Any, Final

from jobs.batch import Endpoint
from jobs.values import unknown, unsupported


class Support(enum.StrEnum):
    """What becomes of a parameter."""

    HONOURED = "honoured"
    WITHOUT_EFFECT = "accepted, without effect"
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One row of the table. `neutral` are values, beside null, that ask for nothing: taken always."""

    name: str
    support: Support
    note: str
    neutral: tuple[object, ...] = ()


def _honoured(name: str, note: str) -> Parameter:
    return Parameter(name=name, support=Support.HONOURED, note=note)


def _refused(name: str, note: str, neutral: tuple[object, ...] = ()) -> Parameter:
    return Parameter(name=name, support=Support.REFUSED, note=note, neutral=neutral)


def _accepted(name: str, note: str) -> Parameter:
    return Parameter(name=name, support=Support.WITHOUT_EFFECT, note=note)


_SAMPLING: Final = (
    _honoured("model", "the served model's name"),
    _honoured("temperature", "0 to 2, default 1; 0 takes the likeliest token"),
    _honoured("top_p", "0 to 1, default 1"),
    _honoured("frequency_penalty", "-2 to 2, over generated tokens"),
    _honoured("presence_penalty", "-2 to 2, over generated tokens"),
    _honoured("logit_bias", "token id to a number from -100 to 100"),
    _honoured("n", "1 to 128 choices, each drawn by itself"),
    _honoured("seed", "the same body and seed give the same text on the same engine"),
    _honoured("stop", "a string or up to 4; the stop is not in the text"),
    _honoured("top_k", "Freight's own: the likeliest so many tokens, 0 for all"),
    _honoured("min_p", "Freight's own: tokens at least this share as likely as the likeliest"),
    _honoured("repetition_penalty", "Freight's own: above 0, over prompt and generated tokens"),
    _honoured("min_tokens", "Freight's own: no end before so many tokens"),
    _honoured("ignore_eos", "Freight's own: end-of-sequence tokens end nothing"),
    _honoured("stop_token_ids", "Freight's own: further tokens that end the text"),
    _accepted("user", "concerns accounts"),
    _refused("stream", "there is nobody to stream to", (False,)),
    _refused("stream_options", "there is nobody to stream to"),
)
_OF_RESPONSES: Final = (
    *("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens"),
    *("ignore_eos", "seed", "user", "stream", "stream_options"),
)
"""Of these parameters, those that `/v1/responses` has too."""

_ACCOUNTS: Final = (
    _accepted("metadata", "concerns stored answers"),
    _accepted("prompt_cache_key", "shared prefixes are found by themselves"),
    _accepted("prompt_cache_retention", "shared prefixes are found by themselves"),
    _accepted("safety_identifier", "concerns accounts"),
    _accepted("service_tier", "there is one tier"),
    _accepted("store", "answers are stored in the batch's output"),
)

_CHAT: Final = (
    _honoured("messages", "all roles; content is text or parts of text"),
    _honoured("max_completion_tokens", "default: all that fits the model's context"),
    _honoured("max_tokens", "the older name of max_completion_tokens"),
    _honoured("logprobs", "of the model's own distribution, whatever changed it afterwards"),
    _honoured("top_logprobs", "0 to 20, with logprobs"),
    _honoured("tools", "functions; shown to the model by its chat template, calls read back"),
    _honoured("tool_choice", "none, auto, required or one function; the latter two constrained"),
    _honoured("parallel_tool_calls", "default true; constrained calls are one without it"),
    _honoured("response_format", "text, json_object and json_schema, by constrained decoding"),
    *_SAMPLING,
    *_ACCOUNTS,
    _refused("audio", "text only"),
    _refused("function_call", "its successor is tool_choice", ("none",)),
    _refused("functions", "its successor is tools", ([],)),
    _refused("modalities", "text only", (["text"],)),
    _refused("moderation", "there is no moderation model"),
    _refused("prediction", "there is no speculation"),
    _refused("reasoning_effort", "the model has no such switch"),
    _refused("verbosity", "the model has no such switch", ("medium",)),
    _refused("web_search_options", "nothing leaves this machine"),
)

_COMPLETIONS: Final = (
    _honoured("prompt", "a string, token ids, or an array of either: n choices each"),
    _honoured("max_tokens", "default 16; 0 for the prompt alone, echoed and scored"),
    _honoured("logprobs", "0 to 5, in the legacy shape; with echo of the prompt's tokens too"),
    *_SAMPLING,
    _honoured("best_of", "1 to 20, at least n: the likeliest by mean log-probability of a token"),
    _honoured("echo", "the prompt before its completion; with logprobs its tokens are scored"),
    _refused("suffix", "the model does not fill in", ("",)),
)

_EMBEDDINGS: Final = (
    _honoured("input", "a string, token ids, or an array of up to 2,048 of either"),
    _honoured("model", "the served model's name"),
    _honoured("encoding_format", "float or base64, default float"),
    _honoured("dimensions", "the first so many values, made to length 1 again; default all"),
    _honoured("pooling", "Freight's own: last token or mean of all; last or mean, default last"),
    _accepted("user", "concerns accounts"),
)

_RESPONSES: Final = (
    _honoured("input", "a string, or messages of text"),
    _honoured("instructions", "a system message before the input"),
    _honoured("max_output_tokens", "at least 16, default: all that fits the model's context"),
    _honoured("text", "its format: text, json_object or json_schema"),
    *(each for each in _SAMPLING if each.name in _OF_RESPONSES),
    _honoured("metadata", "the answer repeats it"),
    *(each for each in _ACCOUNTS if each.name != "metadata"),
    _refused("background", "a batch is in the background anyway", (False,)),
    _refused("conversation", "nothing is stored"),
    _refused("include", "there is nothing to include", ([],)),
    _refused("max_tool_calls", "there are no built-in tools"),
    _refused("parallel_tool_calls", "tools are for chats", (True, False)),
    _refused("previous_response_id", "nothing is stored"),
    _refused("prompt", "there are no stored prompts"),
    _refused("reasoning", "the model has no such switch", ({},)),
    _refused("tool_choice", "tools are for chats", ("none", "auto")),
    _refused("tools", "tools are for chats", ([],)),
    _refused("top_logprobs", "log-probabilities are for chats and completions", (0,)),
    _refused("truncation", "nothing is left out of the input", ("disabled",)),
)

PARAMETERS: Final[Mapping[Endpoint, tuple[Parameter, ...]]] = types.MappingProxyType(
    {
        Endpoint.CHAT_COMPLETIONS: _CHAT,
        Endpoint.COMPLETIONS: _COMPLETIONS,
        Endpoint.EMBEDDINGS: _EMBEDDINGS,
        Endpoint.RESPONSES: _RESPONSES,
    }
)

_BY_NAME: Final[Mapping[Endpoint, Mapping[str, Parameter]]] = types.MappingProxyType(
    {endpoint: {each.name: each for each in table} for endpoint, table in PARAMETERS.items()}
)


def require_supported(body: Mapping[str, Any], endpoint: Endpoint) -> None:
    """Raises InvalidRequestError for the first parameter that is unknown or refused as it is."""
    for name, value in body.items():
        parameter = _BY_NAME[endpoint].get(name)
        if parameter is None:
            raise unknown(name)
        if parameter.support is not Support.REFUSED or value is None:
            continue
        if not _is_among(value, parameter.neutral):
            raise unsupported(name, f"is not supported with this value: {parameter.note}")


def _is_among(value: object, neutral: Sequence[object]) -> bool:
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
    )
