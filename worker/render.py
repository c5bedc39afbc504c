"""From a line's body to the engine's prompt, and from a completion back to a response body.

Knows tokens and the wire's words for them; knows no queue, no ledger and no engine.
"""

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from engine.config import Completion, Prompt, Sampling
from engine.errors import EngineError
from jobs.answers import Answer, answer_body
from jobs.batch import Batch
from jobs.bodies import Ask, parse_body
from jobs.errors import InvalidRequestError, RequestError


class TextTokenizer(Protocol):
    """What rendering needs of `engine.tokenizer.Tokenizer`."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Renderer:
    tokenizer: TextTokenizer
    max_context_tokens: int

    def prompt(self, batch: Batch, line_index: int, body: Mapping[str, Any]) -> Prompt:
        """Raises InvalidRequestError where the line gets a 400."""
        ask = parse_body(body, batch.endpoint)
        token_ids = self._token_ids(ask)
        return Prompt(
            key=row_key(batch.id, line_index),
            token_ids=token_ids,
            sampling=Sampling(
                max_tokens=self._max_tokens(ask, len(token_ids)),
                temperature=ask.temperature,
                top_p=ask.top_p,
                seed=_stable_seed(batch.id, line_index) if ask.seed is None else ask.seed,
                min_tokens=ask.min_tokens,
                stop=ask.stop,
                ignore_eos=ask.ignore_eos,
            ),
        )

    def _token_ids(self, ask: Ask) -> tuple[int, ...]:
        if ask.token_ids is not None:
            return self._known(ask.token_ids)
        param = "prompt" if ask.messages is None else "messages"
        try:
            if ask.messages is not None:
                found = self.tokenizer.render_chat([_templated(item) for item in ask.messages])
            else:
                found = self.tokenizer.encode(ask.text or "")
        except EngineError as error:  # no tokenizer, no template, or one that refuses this
            raise _invalid(str(error), param) from error
        if not found:
            raise _invalid(f"Invalid '{param}': it holds no tokens.", param)
        return tuple(found)

    def _known(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        vocab_size = self.tokenizer.vocab_size
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size:
                raise _invalid(
                    f"Invalid 'prompt[{index}]': expected a token id from 0 to {vocab_size - 1}, "
                    f"but got {token_id} instead.",
                    f"prompt[{index}]",
                )
        return token_ids

    def _max_tokens(self, ask: Ask, num_prompt_tokens: int) -> int:
        limit = self.max_context_tokens
        param = "prompt" if ask.messages is None else "messages"
        opening = f"This model's maximum context length is {limit} tokens. However, "
        if num_prompt_tokens >= limit:
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
            raise InvalidRequestError(
                f"Invalid 'min_tokens': integer above maximum value. Expected a value "
                f"<= {max_tokens}, but got {ask.min_tokens} instead.",
                param="min_tokens",
                code="integer_above_max_value",
            )
        return max_tokens


def response_body(batch: Batch, line_index: int, completion: Completion) -> dict[str, Any]:
    answer = Answer(
        batch_id=batch.id,
        line_index=line_index,
        model=batch.model or "",
        created_at=int(time.time()),
        text=completion.text,
        finish_reason=completion.finish_reason.value,
        num_prompt_tokens=completion.num_prompt_tokens,
        num_generated_tokens=completion.num_generated,
    )
    return answer_body(answer, batch.endpoint)


def error_body(error: RequestError) -> dict[str, Any]:
    """The error of a line that is refused with 400."""
    return {
        "message": error.message,
        "type": "invalid_request_error",
        "param": error.param,
        "code": error.code,
    }


def row_key(batch_id: str, line_index: int) -> str:
    return f"{batch_id}/{line_index}"


def parse_row_key(key: str) -> tuple[str, int]:
    batch_id, _, line_index = key.rpartition("/")
    return batch_id, int(line_index)


def _stable_seed(batch_id: str, line_index: int) -> int:
    # A line that is run again after a crash repeats what it would have said.
    digest = hashlib.sha256(f"seed:{batch_id}:{line_index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _templated(message: Mapping[str, str]) -> Mapping[str, str]:
    # Chat templates know the older word only, and most refuse a role they do not know.
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_value")
