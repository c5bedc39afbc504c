"""Bodies of `/v1/chat/completions` and `/v1/completions`: what a line may ask, in the wire's words.

Whatever cannot be honoured is refused by name, never silently ignored. Knows no tokens and no
engine; the answers' bodies are in `jobs.answers`.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Final

from jobs.batch import Endpoint
from jobs.errors import InvalidRequestError
from jobs.values import (
    boolean,
    integer,
    missing,
    number,
    unicode_text,
    unknown,
    unsupported,
    wrong_type,
)

MAX_STOPS: Final = 4
DEFAULT_COMPLETION_TOKENS: Final = 16
ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_MESSAGE_KEYS: Final = ("name", "tool_call_id")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One line's request, checked and with its defaults; `max_tokens` None is all that fits.

    Exactly one of `messages`, `text` and `token_ids` is set.
    """

    messages: tuple[Mapping[str, str], ...] | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


_SHARED: Final = frozenset(
    {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "ignore_eos", "min_tokens"}
)
_SUPPORTED: Final[Mapping[Endpoint, frozenset[str]]] = types.MappingProxyType(
    {
        Endpoint.CHAT_COMPLETIONS: _SHARED | {"messages", "max_completion_tokens"},
        Endpoint.COMPLETIONS: _SHARED | {"prompt"},
    }
)
"""What changes the answer. `ignore_eos` and `min_tokens` are Freight's own extensions."""

_ACCEPTED: Final = frozenset(
    {"user", "safety_identifier", "prompt_cache_key", "metadata", "store", "service_tier"}
)
"""Taken and without effect: they concern accounts and caches, not the answer."""

_BOTH_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = types.MappingProxyType(
    {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "n": (1,),
        "stream": (False,),
        "stream_options": (),
    }
)
_NEUTRAL: Final[Mapping[Endpoint, Mapping[str, tuple[object, ...]]]] = types.MappingProxyType(
    {
        Endpoint.CHAT_COMPLETIONS: {
            **_BOTH_NEUTRAL,
            "audio": (),
            "function_call": ("none", "auto"),
            "functions": ([],),
            "logprobs": (False,),
            "modalities": (["text"],),
            "moderation": (),
            "parallel_tool_calls": (True, False),
            "prediction": (),
            "reasoning_effort": (),
            "response_format": ({"type": "text"},),
            "tool_choice": ("none", "auto"),
            "tools": ([],),
            "top_logprobs": (0,),
            "verbosity": ("medium",),
            "web_search_options": (),
        },
        Endpoint.COMPLETIONS: {
            **_BOTH_NEUTRAL,
            "best_of": (1,),
            "echo": (False,),
            "logprobs": (),
            "suffix": ("",),
        },
    }
)
"""Known parameters without support, and the values (beside null) that ask for nothing."""


def parse_body(body: Mapping[str, Any], endpoint: Endpoint) -> Ask:
    """Raises InvalidRequestError with the first fault: its words, parameter and code."""
    for name, value in body.items():
        _require_supported(name, value, endpoint)
    given = {name: value for name, value in body.items() if value is not None}
    return Ask(
        **_content(given, endpoint),
        max_tokens=_max_tokens(given, endpoint),
        temperature=number(given, "temperature", default=1.0, high=2),
        top_p=number(given, "top_p", default=1.0, high=1),
        seed=_seed(given),
        min_tokens=integer(given, "min_tokens", low=0) or 0,
        stop=_stop(given),
        ignore_eos=boolean(given, "ignore_eos"),
    )


def _require_supported(name: str, value: object, endpoint: Endpoint) -> None:
    if name in _SUPPORTED[endpoint] or name in _ACCEPTED:
        return
    neutral = _NEUTRAL[endpoint].get(name)
    if neutral is None:
        raise unknown(name)
    if value is not None and not any(_same(value, allowed) for allowed in neutral):
        raise unsupported(name, "is not supported with this value by this server")


def _same(value: object, allowed: object) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _content(given: Mapping[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    if endpoint is Endpoint.CHAT_COMPLETIONS:
        messages = given.get("messages")
        if not isinstance(messages, list):
            raise wrong_type("messages", "an array of objects", messages)
        return {"messages": tuple(_message(*item) for item in enumerate(messages))}
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return {"text": unicode_text(prompt, "prompt")}
    if not isinstance(prompt, list):
        raise wrong_type("prompt", "a string or an array of integers", prompt)
    if any(isinstance(item, str | list) for item in prompt):
        raise unsupported("prompt", f"holds {len(prompt)} prompts; this server takes one a line")
    return {"token_ids": tuple(_token_id(*item) for item in enumerate(prompt))}


def _token_id(index: int, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(f"prompt[{index}]", "an integer", value)
    return value


def _message(index: int, message: object) -> Mapping[str, str]:
    place = f"messages[{index}]"
    if not isinstance(message, dict):
        raise wrong_type(place, "an object", message)
    found = {
        "role": _role(message.get("role"), f"{place}.role"),
        "content": _text_of(message.get("content"), f"{place}.content"),
    }
    for name, value in message.items():
        if name in found or value is None or value == []:
            continue
        if name not in _MESSAGE_KEYS:
            raise unsupported(f"{place}.{name}", "is not supported by this server")
        if not isinstance(value, str):
            raise wrong_type(f"{place}.{name}", "a string", value)
        found[name] = unicode_text(value, f"{place}.{name}")
    return found


def _role(role: object, place: str) -> str:
    if role is None:
        raise missing(place)
    if not isinstance(role, str):
        raise wrong_type(place, "a string", role)
    if role not in ROLES:
        names = ", ".join(f"'{name}'" for name in ROLES[:-1]) + f", and '{ROLES[-1]}'"
        raise InvalidRequestError(
            f"Invalid value for '{place}'. Supported values are: {names}.",
            param=place,
            code="invalid_value",
        )
    return role


def _text_of(content: object, place: str) -> str:
    if isinstance(content, str):
        return unicode_text(content, place)
    if content is None:
        raise missing(place)
    if not isinstance(content, list):
        raise wrong_type(place, "a string or an array of text parts", content)
    return "".join(_text_part(part, f"{place}[{index}]") for index, part in enumerate(content))


def _text_part(part: object, place: str) -> str:
    if not isinstance(part, dict):
        raise wrong_type(place, "an object", part)
    if part.get("type") != "text":
        raise unsupported(f"{place}.type", "is not 'text', the only type this server takes")
    if not isinstance(part.get("text"), str):
        raise wrong_type(f"{place}.text", "a string", part.get("text"))
    return unicode_text(part["text"], f"{place}.text")


def _max_tokens(given: Mapping[str, Any], endpoint: Endpoint) -> int | None:
    if endpoint is Endpoint.COMPLETIONS:
        return integer(given, "max_tokens", low=1) or DEFAULT_COMPLETION_TOKENS
    old = integer(given, "max_tokens", low=1)
    new = integer(given, "max_completion_tokens", low=1)
    if old is not None and new is not None and old != new:
        raise InvalidRequestError(
            f"Invalid 'max_tokens': {old} differs from 'max_completion_tokens', which is {new}. "
            "Give one of them.",
            param="max_tokens",
            code="invalid_value",
        )
    return new if new is not None else old


def _seed(given: Mapping[str, Any]) -> int | None:
    return integer(given, "seed", low=-(2**63), high=2**63 - 1)


def _stop(given: Mapping[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop", [])
    if isinstance(stop, str):
        return (_stop_text(stop, "stop"),)
    if not isinstance(stop, list):
        raise wrong_type("stop", "a string or an array of strings", stop)
    if len(stop) > MAX_STOPS:
        raise InvalidRequestError(
            f"Invalid 'stop': array too long. Expected an array with maximum length {MAX_STOPS}, "
            f"but got an array with length {len(stop)} instead.",
            param="stop",
            code="array_above_max_length",
        )
    return tuple(_stop_text(item, f"stop[{index}]") for index, item in enumerate(stop))


def _stop_text(text: object, place: str) -> str:
    if not isinstance(text, str):
        raise wrong_type(place, "a string", text)
    if not text:
        raise InvalidRequestError(
            f"Invalid '{place}': empty strings are not allowed.", param=place, code="invalid_value"
        )
    return unicode_text(text, place)
