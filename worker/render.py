"""From a line's body to the engine's prompts. Knows tokens, and the wire's words for what is wrong
with them; knows no queue, no ledger and no engine. The way back is `worker.answering`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from engine.config import (
    Embedding,
    Grammar,
    GrammarKind,
    Pooling,
    Prompt,
    Sampling,
    Scoring,
)
from engine.errors import EngineError, GrammarError, PromptError
from engine.grammar import check_grammar
from jobs.batch import Endpoint
from jobs.bodies import Ask, parse_body
from jobs.errors import InvalidRequestError, RequestError
from jobs.prompts import PromptText
from jobs.values import above_maximum, invalid_value, unsupported
from worker.tool_calls import FAMILIES
from worker.tool_calls.base import Family
from worker.tool_calls.base import grammar as grammar_of_calls


class TextTokenizer(Protocol):
    """What rendering and answering need of `engine.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def chat_template(self) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def special_token_id(self, text: str) -> int | None: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class Checker(Protocol):
    """What rendering needs of an engine."""

    def check(self, prompt: Prompt) -> None: ...


class Origin(Protocol):
    """Where a body came from: a batch, or a rider. Ids and seeds of what answers it derive from `id`."""

    @property
    def id(self) -> str: ...
    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def model(self) -> str | None: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """One line as the engine takes it: a prompt for each of its texts, `ask.num_texts` rows of each.

    `family` is how its answers write calls of functions, if there are any to call.
    """

    ask: Ask
    prompts: tuple[Prompt, ...]
    family: Family | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Renderer:
    tokenizer: TextTokenizer
    max_context_tokens: int

    def render(self, origin: Origin, line_index: int, body: Mapping[str, Any]) -> Rendered:
        """Raises InvalidRequestError where the line gets a 400."""
        ask = parse_body(body, origin.endpoint)
        family = None if ask.tool_use is None else self._family()
        grammar = self._grammar(ask, family)
        seed = _stable_seed(origin.id, line_index) if ask.seed is None else ask.seed
        prompts = []
        for part, token_ids in enumerate(self._texts(ask)):
            max_tokens = self._max_tokens(ask, len(token_ids))
            sampling = _sampling(ask, max_tokens=max_tokens, seed=seed + part, grammar=grammar)
            key = row_key(origin.id, line_index, part)
            prompts.append(
                Prompt(key=key, token_ids=token_ids, sampling=sampling, reading=_reading(ask))
            )
        return Rendered(ask=ask, prompts=tuple(prompts), family=family)

    def render_for(
        self, engine: Checker, origin: Origin, line_index: int, body: Mapping[str, Any]
    ) -> Rendered:
        """What the engine will take. Raises RequestError where the line gets a 400."""
        rendered = self.render(origin, line_index, body)
        try:
            for prompt in rendered.prompts:
                engine.check(prompt)
        except PromptError as error:
            raise InvalidRequestError(str(error), param=error.param, code=error.code) from error
        return rendered

    def _family(self) -> Family:
        template = self.tokenizer.chat_template
        found = next((family for family in FAMILIES if family.fits(template)), None)
        if found is None:
            raise unsupported(
                "tools", "is nothing that this model's chat template knows how to call"
            )
        return found

    def _grammar(self, ask: Ask, family: Family | None) -> Grammar | None:
        """Raises InvalidRequestError with what of a schema cannot be honoured."""
        if ask.schema is not None:
            return _checked(ask.schema, ask.schema_param)
        if ask.tool_use is None or family is None or not ask.tool_use.is_constrained:
            return None
        for tool in ask.tool_use.callable:
            _checked(tool.parameters, f"tools.{tool.name}.parameters")
        special = self.tokenizer.special_token_id
        form = family.form(ask.tool_use, self.tokenizer.chat_template, special)
        return Grammar(kind=GrammarKind.LARK, text=grammar_of_calls(form, ask.tool_use, special))

    def _texts(self, ask: Ask) -> list[tuple[int, ...]]:
        if ask.messages is not None:
            tools = ask.tool_use.offered if ask.tool_use else ()
            return [self._chat(ask, [tool.definition for tool in tools])]
        if len(ask.prompts) == 1:
            return [self._text(ask.prompts[0], ask.param)]
        return [self._text(text, f"{ask.param}[{at}]") for at, text in enumerate(ask.prompts)]

    def _chat(self, ask: Ask, tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        template = self.tokenizer.chat_template
        family = next((family for family in FAMILIES if family.fits(template)), None)
        id_characters = None if family is None else family.id_characters
        templated = [_templated(item, id_characters) for item in ask.messages or ()]
        try:
            found = self.tokenizer.render_chat(templated, tools=tools)
        except EngineError as error:  # no template, or one that refuses this
            raise invalid_value(ask.param, str(error)) from error
        return _some(found, ask.param)

    def _text(self, text: PromptText, param: str) -> tuple[int, ...]:
        if not isinstance(text, str):
            return _some(self._known(text, param), param)
        try:
            return _some(self.tokenizer.encode(text), param)
        except EngineError as error:  # no tokenizer
            raise invalid_value(param, str(error)) from error

    def _known(self, token_ids: tuple[int, ...], param: str) -> tuple[int, ...]:
        vocab_size = self.tokenizer.vocab_size
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size:
                raise invalid_value(
                    f"{param}[{index}]",
                    f"expected a token id from 0 to {vocab_size - 1}, but got {token_id} instead",
                )
        return token_ids

    def _max_tokens(self, ask: Ask, num_prompt_tokens: int) -> int:
        limit = self.max_context_tokens
        param = ask.param
        opening = f"This model's maximum context length is {limit} tokens. However, "
        if num_prompt_tokens > limit - (ask.max_tokens != 0):
            raise InvalidRequestError(
                f"{opening}your {param} resulted in {num_prompt_tokens} tokens. "
                f"Please reduce the length of the {param}.",
                param=param,
                code="context_length_exceeded",
            )
        max_tokens = limit - num_prompt_tokens if ask.max_tokens is None else ask.max_tokens
        if num_prompt_tokens + max_tokens > limit:
            raise InvalidRequestError(
                f"{opening}you requested {num_prompt_tokens + max_tokens} tokens "
                f"({num_prompt_tokens} in the {param}, {max_tokens} in the completion). "
                f"Please reduce the length of the {param} or completion.",
                param=param,
                code="context_length_exceeded",
            )
        if ask.min_tokens > max_tokens:
            raise above_maximum("min_tokens", max_tokens, ask.min_tokens)
        return max_tokens


def _sampling(ask: Ask, *, max_tokens: int, seed: int, grammar: Grammar | None) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        top_k=ask.top_k,
        min_p=ask.min_p,
        presence_penalty=ask.presence_penalty,
        frequency_penalty=ask.frequency_penalty,
        repetition_penalty=ask.repetition_penalty,
        logit_bias=ask.logit_bias,
        seed=seed,
        n=ask.num_texts,
        min_tokens=ask.min_tokens,
        stop=ask.stop,
        stop_token_ids=ask.stop_token_ids,
        ignore_eos=ask.ignore_eos,
        logprobs=0 if ask.logprobs is None and ask.best_of else ask.logprobs,
        grammar=grammar,
    )


def _reading(ask: Ask) -> Scoring | Embedding | None:
    if ask.embedding is not None:
        pooling = Pooling(ask.embedding.pooling.value)
        return Embedding(pooling=pooling, dimensions=ask.embedding.dimensions)
    return Scoring(num_top=ask.logprobs or 0) if ask.scores_prompts else None


def _checked(schema: Mapping[str, Any], param: str) -> Grammar:
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))
    try:
        check_grammar(grammar)
    except GrammarError as error:
        raise invalid_value(param, f"the schema cannot be kept to: {error}") from error
    return grammar


def error_body(error: RequestError) -> dict[str, Any]:
    """The error of a line that is refused with 400."""
    return {
        "message": error.message,
        "type": "invalid_request_error",
        "param": error.param,
        "code": error.code,
    }


def row_key(batch_id: str, line_index: int, part: int = 0) -> str:
    """The engine's key of a line's prompts; `part` tells them apart."""
    return f"{batch_id}/{line_index}/{part}"


def parse_row_key(key: str) -> tuple[str, int, int]:
    batch_id, line_index, part = key.rsplit("/", 2)
    return batch_id, int(line_index), int(part)


def _some(token_ids: Sequence[int], param: str) -> tuple[int, ...]:
    if not token_ids:
        raise invalid_value(param, "it holds no tokens")
    return tuple(token_ids)


def _stable_seed(batch_id: str, line_index: int) -> int:
    # A line that is run again after a crash repeats what it would have said.
    digest = hashlib.sha256(f"seed:{batch_id}:{line_index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _templated(message: Mapping[str, Any], id_characters: int | None) -> Mapping[str, Any]:
    # Chat templates know the older words only, and most refuse a role they do not know.
    role = {"developer": "system", "function": "tool"}.get(message["role"], message["role"])
    found = {**message, "role": role}
    if id_characters is None:
        return found
    if "tool_call_id" in found:
        found["tool_call_id"] = _short_id(found["tool_call_id"], id_characters)
    if "tool_calls" in found:
        found["tool_calls"] = [
            {**call, "id": _short_id(call.get("id", ""), id_characters)}
            for call in found["tool_calls"]
        ]
    return found


def _short_id(call_id: str, num_characters: int) -> str:
    """Another id of the length that a template asks for, the same for the same call."""
    return hashlib.sha256(call_id.encode()).hexdigest()[:num_characters]
