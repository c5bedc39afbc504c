"""An engine and a tokenizer without a model: a completion depends on its prompt alone."""

import os
import signal
import struct
import time
from collections.abc import Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

from engine.config import (
    Completion,
    Embedding,
    FinishReason,
    Prompt,
    Scoring,
    TokenLogprobs,
)
from engine.errors import EngineError, PromptError
from engine.sweep.call_log import CallLog, LoggedRow
from engine.sweep.report import Report

POISON = 666
"""A prompt that holds this token makes every sweep it is in raise."""
LETHAL = 667
"""One that holds this token kills the process, as the kernel does when memory runs out."""
MORTAL = 668
"""One that holds this token makes the sweep raise, and every call after that, as a GPU does."""


class FakeTokenizer:
    """One token a byte; a message is its role's first letter and its content."""

    vocab_size = 1_000

    def __init__(self, chat_template: str = "") -> None:
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def special_token_id(self, text: str) -> int | None:
        return None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token_ids).decode()

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        text = "".join(f"[{tool['function']['name']}]" for tool in tools)
        text += "".join(f"{message['role'][0]}{message['content']}" for message in messages)
        if "refuse me" in text:
            raise EngineError("the chat template refuses the messages")
        return self.encode(text)


class FakeEngine:
    """One token a row and sweep, the same for all rows of a prompt. `witness` is a call log, the real engine's own."""

    fingerprint = "fake"

    def __init__(
        self,
        *,
        block_rows: int = 64,
        max_context_tokens: int = 256,
        sweep_s: float = 0.0,
        num_layers: int = 1,
        witness: Path | None = None,
        raises_always: bool = False,
    ) -> None:
        self.block_rows = block_rows
        self.max_context_tokens = max_context_tokens
        self.num_sweeps = 0
        self.num_steps = 0
        self.largest_block = 0
        self.num_generated = 0
        self._sweep_s = sweep_s
        self._num_layers = num_layers
        self._call_log = CallLog(witness)
        self._raises_always = raises_always
        self._is_dead = False
        self._rows: dict[str, tuple[Prompt, list[int]]] = {}

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def check(self, prompt: Prompt) -> None:
        if len(prompt.token_ids) >= self.max_context_tokens:
            raise PromptError("too long", code="context_length_exceeded", param="prompt")

    def submit(self, prompt: Prompt) -> None:
        assert prompt.key not in self._rows
        self._rows[prompt.key] = (prompt, [])
        self._call_log.submit(
            prompt.key,
            prompt_tokens=len(prompt.token_ids),
            max_tokens=prompt.sampling.max_tokens,
        )

    def cancel(self, key: str) -> None:
        self._require_alive()
        self._rows.pop(key, None)
        self._call_log.cancel(key)

    def sweep(self) -> list[Completion]:
        for _ in range(self._num_layers):
            time.sleep(self._sweep_s / self._num_layers)
            self.num_steps += 1
        self._require_alive()
        block = dict(sorted(self._rows.items(), key=_precedence)[: self.block_rows])
        self._call_log.sweep(self.num_sweeps + 1, list(starmap(_logged, block.values())))
        self._is_dead = any(MORTAL in prompt.token_ids for prompt, _ in block.values())
        self._require_alive()
        if self._raises_always or any(POISON in prompt.token_ids for prompt, _ in block.values()):
            raise RuntimeError("the device is gone")
        if any(LETHAL in prompt.token_ids for prompt, _ in block.values()):
            os.kill(os.getpid(), signal.SIGKILL)
        self.num_sweeps += 1
        self.num_generated += len(block)
        self.largest_block = max(self.largest_block, len(block))
        for prompt, tokens in block.values():
            if prompt.sampling.max_tokens:
                tokens.append(97 + (sum(prompt.token_ids) + len(tokens)) % 26)
        done = [key for key, (prompt, tokens) in block.items() if _is_done(prompt, tokens)]
        finished = [self._rows.pop(key) for key in done]
        completions = [
            _completion(prompt, tokens, index)
            for prompt, tokens in finished
            for index in range(prompt.sampling.n)
        ]
        for each in completions:
            self._call_log.finish(each.key, reason=each.finish_reason, tokens=each.num_generated)
        return completions

    def _require_alive(self) -> None:
        if self._is_dead:
            raise RuntimeError("CUDA error: device-side assert triggered")

    def report(self) -> Report:
        """Only sweeps and tokens are counted."""
        return Report(
            policy_reason="fake",
            num_sweeps=self.num_sweeps,
            generated_tokens=self.num_generated,
        )

    def close(self) -> None:
        self._rows.clear()
        self._call_log.close()


def _precedence(row: tuple[str, tuple[Prompt, list[int]]]) -> int:
    """Rows in the block, then those that go first."""
    _, (prompt, tokens) = row
    return 0 if tokens else 1 if prompt.goes_first else 2


def _logged(prompt: Prompt, tokens: list[int]) -> LoggedRow:
    position = len(prompt.token_ids) + len(tokens) - 1 if tokens else 0
    return LoggedRow(prompt.key, 0, position, 1 if tokens else len(prompt.token_ids), sampled=True)


def _is_done(prompt: Prompt, tokens: list[int]) -> bool:
    return len(tokens) >= prompt.sampling.max_tokens


def _completion(prompt: Prompt, tokens: list[int], index: int) -> Completion:
    num_top = prompt.sampling.logprobs
    reading = prompt.reading if index == 0 else None
    is_scored, is_embedded = isinstance(reading, Scoring), isinstance(reading, Embedding)
    return Completion(
        key=prompt.key,
        index=index,
        token_ids=tuple(tokens),
        text=bytes(tokens).decode(),
        finish_reason=FinishReason.LENGTH,
        num_prompt_tokens=len(prompt.token_ids),
        num_generated=len(tokens),
        logprobs=None if num_top is None else tuple(_scored(token, num_top) for token in tokens),
        prompt_logprobs=tuple(_scored(token, 0) for token in prompt.token_ids[1:])
        if is_scored
        else None,
        embedding=struct.pack("<2f", 0.6, 0.8) if is_embedded else None,
    )


def _scored(token_id: int, num_top: int) -> TokenLogprobs:
    top = ((token_id, -0.25), (token_id - 1, -1.5))
    return TokenLogprobs(token_id=token_id, logprob=-0.25, top=top[:num_top])
