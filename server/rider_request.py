"""The body of a request outside batches: a line's body, and what HTTP alone may ask beside it."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Final

from jobs import values
from jobs.batch import Endpoint
from jobs.bodies import parse_body
from jobs.errors import InvalidRequestError
from jobs.parameters import PARAMETERS
from jobs.streams import STREAMS
from server.json_body import json_object

_REQUIRED: Final[Mapping[Endpoint, str]] = types.MappingProxyType(
    {
        Endpoint.CHAT_COMPLETIONS: "messages",
        Endpoint.COMPLETIONS: "prompt",
        Endpoint.EMBEDDINGS: "input",
        Endpoint.RESPONSES: "input",
    }
)
_ANSWERED: Final[Mapping[Endpoint, tuple[str, ...]]] = types.MappingProxyType(
    {
        Endpoint.CHAT_COMPLETIONS: ("id", "object", "created", "model", "choices", "usage"),
        Endpoint.COMPLETIONS: ("id", "object", "created", "model", "choices", "usage"),
        Endpoint.EMBEDDINGS: ("object", "data", "model", "usage"),
        Endpoint.RESPONSES: ("id", "object", "created_at", "model", "output", "usage"),
    }
)
_STREAM: Final = "stream"
_OPTIONS: Final = "stream_options"
_KNOWN_OPTIONS: Final = ("include_usage", "include_obfuscation")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """As a stream of events, or not; `with_usage`: with an event of its own for that."""

    is_streamed: bool = False
    with_usage: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RiderRequest:
    """`body` is what a line of a batch would have."""

    model: str
    body: Mapping[str, Any]
    form: AnswerForm


def parse_rider_request(raw: bytes, endpoint: Endpoint) -> RiderRequest:
    """Raises InvalidRequestError, with what a line would be refused with where it would be too."""
    data = json_object(raw, read=values.read_json)
    model = data.get("model")
    if model is None:
        raise InvalidRequestError("you must provide a model parameter")
    if not isinstance(model, str):
        raise values.wrong_type("model", "a string", model)
    required = _REQUIRED.get(endpoint)
    if required is not None and data.get(required) is None:
        raise values.missing(required)
    form = AnswerForm()
    if endpoint in STREAMS:
        form = _form(data)
        data = {name: value for name, value in data.items() if name not in (_STREAM, _OPTIONS)}
    parse_body(data, endpoint)
    return RiderRequest(model=model, body=data, form=form)


def request_schema(endpoint: Endpoint) -> dict[str, Any]:
    """For the OpenAPI page: names and what becomes of them. The parsers say more than a schema can."""
    notes = {each.name: f"{each.support}: {each.note}" for each in PARAMETERS[endpoint]}
    if endpoint in STREAMS:
        notes[_STREAM] = "honoured: the whole answer as a stream, at its end"
        notes[_OPTIONS] = "honoured: include_usage; include_obfuscation is without effect"
    return {
        "type": "object",
        "required": ["model", *([_REQUIRED[endpoint]] if endpoint in _REQUIRED else [])],
        "additionalProperties": False,
        "properties": {name: {"description": note} for name, note in notes.items()},
    }


def answers_of(endpoint: Endpoint) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI page: what an answer always has, and that it may come as a stream."""
    whole = {"type": "object", "required": list(_ANSWERED[endpoint])}
    content: dict[str, Any] = {"application/json": {"schema": whole}}
    if endpoint in STREAMS:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {200: {"content": content}}


def _form(data: Mapping[str, Any]) -> AnswerForm:
    is_streamed = values.boolean(_given(data), _STREAM)
    with_usage = _with_usage(data.get(_OPTIONS), is_streamed=is_streamed)
    return AnswerForm(is_streamed=is_streamed, with_usage=with_usage)


def _given(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if value is not None}


def _with_usage(options: object, *, is_streamed: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise values.wrong_type(_OPTIONS, "an object", options)
    if not is_streamed:
        raise values.invalid_value(_OPTIONS, "it is only allowed when 'stream' is true")
    for name in options:
        if name not in _KNOWN_OPTIONS:
            raise values.unknown(f"{_OPTIONS}.{name}")
    asked = {f"{_OPTIONS}.{name}": value for name, value in _given(options).items()}
    with_usage, _ = (values.boolean(asked, f"{_OPTIONS}.{name}") for name in _KNOWN_OPTIONS)
    return with_usage
