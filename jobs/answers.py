"""The bodies that answer a line: full shapes of the endpoints' responses; knows no tokenizer."""

import codecs
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.batch import Endpoint


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """A token as a text's bytes, and how likely it was; `top` are the likeliest in its place. Of the
    first token of all nobody knows how likely it was. One that is not shown takes no place in the text.
    """

    raw: bytes
    logprob: float | None
    top: tuple["TokenScore", ...] = ()
    is_shown: bool = True

    @property
    def text(self) -> str:
        return self.raw.decode("utf-8", "replace")

    @property
    def name(self) -> str:
        """Its text, or where that is no whole characters its bytes written out, as OpenAI does."""
        try:
            return self.raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{each:02x}" for each in self.raw)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that the model wants called; `arguments` are a JSON object, written out."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One text that was generated. `finish_reason` is the contract's word."""

    text: str
    finish_reason: str
    scores: tuple[TokenScore, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one line: its prompts are counted once, however many choices each had."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def as_body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.input_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.input_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was generated for one line. `fingerprint` changes with whatever may change an answer;
    `echoed` are fields of the request that a response repeats.
    """

    batch_id: str
    line_index: int
    model: str
    fingerprint: str
    created_at: int
    choices: tuple[Choice, ...]
    usage: Usage
    echoed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def answer_body(answer: Answer, endpoint: Endpoint) -> dict[str, Any]:
    """Of the two endpoints that answer with choices."""
    chat = endpoint is Endpoint.CHAT_COMPLETIONS
    choices = enumerate(answer.choices)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{_digest(answer)}",
        "object": "chat.completion" if chat else "text_completion",
        "created": answer.created_at,
        "model": answer.model,
        "choices": [
            _chat_choice(answer, *each) if chat else _text_choice(*each) for each in choices
        ],
        "usage": answer.usage.as_body(),
        "system_fingerprint": f"fp_{answer.fingerprint}",
        **({"service_tier": "default"} if chat else {}),
    }


def _chat_choice(answer: Answer, index: int, choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text or (None if choice.tool_calls else ""),
        "refusal": None,
        "annotations": [],
    }
    if choice.tool_calls:
        message["tool_calls"] = [
            {
                "id": f"call_{_digest(answer, 'call', index, at)[:24]}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for at, call in enumerate(choice.tool_calls)
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": None if choice.scores is None else _chat_logprobs(choice.scores),
        "finish_reason": choice.finish_reason,
    }


def _chat_logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    content = [
        _chat_score(score) | {"top_logprobs": [_chat_score(other) for other in score.top]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _chat_score(score: TokenScore) -> dict[str, Any]:
    return {"token": score.text, "logprob": score.logprob, "bytes": list(score.raw)}


def _text_choice(index: int, choice: Choice) -> dict[str, Any]:
    return {
        "text": choice.text,
        "index": index,
        "logprobs": None if choice.scores is None else _text_logprobs(choice.scores),
        "finish_reason": choice.finish_reason,
    }


def _text_logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    return {
        "tokens": [score.name for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_likeliest(score) for score in scores],
        "text_offset": list(_offsets(scores)),
    }


def _likeliest(score: TokenScore) -> Mapping[str, float | None] | None:
    """The token itself among them; of two that look alike, the likelier one."""
    if score.logprob is None:
        return None
    return {score.name: score.logprob} | {
        other.name: other.logprob for other in reversed(score.top)
    }


def _offsets(scores: Sequence[TokenScore]) -> Iterator[int]:
    """Where each token begins, in characters that were whole before it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    num_characters = 0
    for score in scores:
        yield num_characters
        num_characters += len(decoder.decode(score.raw)) if score.is_shown else 0


def _digest(answer: Answer, *facts: object) -> str:
    # Derived, not drawn: the same line always has the same ids.
    name = ":".join(map(str, ["answer", answer.batch_id, answer.line_index, *facts]))
    return hashlib.sha256(name.encode()).hexdigest()[:32]
