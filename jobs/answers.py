"""The bodies that answer a line: full shapes of the two endpoints' responses; knows no tokens."""

import dataclasses
import hashlib
from typing import Any

from jobs.batch import Endpoint


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was generated for one line. `finish_reason` is the contract's word: stop or length."""

    batch_id: str
    line_index: int
    model: str
    created_at: int
    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_generated_tokens: int


def answer_body(answer: Answer, endpoint: Endpoint) -> dict[str, Any]:
    chat = endpoint is Endpoint.CHAT_COMPLETIONS
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{_digest(answer)}",
        "object": "chat.completion" if chat else "text_completion",
        "created": answer.created_at,
        "model": answer.model,
        "choices": [_chat_choice(answer) if chat else _text_choice(answer)],
        "usage": _usage(answer),
        "system_fingerprint": None,
        **({"service_tier": None} if chat else {}),
    }


def _chat_choice(answer: Answer) -> dict[str, Any]:
    return {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": None,
        "finish_reason": answer.finish_reason,
    }


def _text_choice(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "index": 0,
        "logprobs": None,
        "finish_reason": answer.finish_reason,
    }


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_generated_tokens,
        "total_tokens": answer.num_prompt_tokens + answer.num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _digest(answer: Answer) -> str:
    # Derived, not drawn: the same line always has the same id.
    name = f"answer:{answer.batch_id}:{answer.line_index}"
    return hashlib.sha256(name.encode()).hexdigest()[:32]
