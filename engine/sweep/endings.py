"""When a row has said enough, and what its completion then says: ends of sequence, stop strings and
limits. Knows tokens and their text, not how they came about.
"""

from collections.abc import Iterable
from typing import Final

from engine.config import Completion, FinishReason
from engine.sweep.readings import embedding, prompt_logprobs
from engine.sweep.rows import Row
from engine.tokenizer import Tokenizer

_STOP_MARGIN_TOKENS: Final = 8
"""Beyond one token for each byte of a stop string: tokens that decode to nothing on their own."""


class Endings:
    """Ends rows at the model's own end tokens and at what their prompts ask for."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)

    def reason_to_end(self, row: Row, token: int) -> FinishReason | None:
        """Why the row ends with `token`, the last it has generated; None if it goes on."""
        sampling, matcher = row.prompt.sampling, row.matcher
        if matcher is not None:
            matcher.follow(row.generated)
            if matcher.fault is not None:
                return FinishReason.FAULT
            if matcher.is_complete():
                return FinishReason.STOP
        if self._ends(row, token):
            return FinishReason.STOP
        if sampling.stop and len(row.generated) >= sampling.min_tokens and self._stops(row):
            return FinishReason.STOP
        if row.num_tokens >= row.limit_tokens:
            return FinishReason.LENGTH
        return None

    def complete(self, row: Row, reason: FinishReason) -> Completion:
        """What the ended row has to say, without the end token or stop string that ended it."""
        is_ended = bool(row.generated) and self._ends(row, row.generated[-1])
        num_kept = len(row.generated) - is_ended
        token_ids = row.generated[:num_kept]
        text = self._tokenizer.decode(token_ids)
        end = self._stop_at(row, text) if reason is FinishReason.STOP else None
        asked = row.prompt.sampling.logprobs is not None
        return Completion(
            key=row.prompt.key,
            index=row.index,
            token_ids=tuple(token_ids),
            text=text[:end],
            finish_reason=reason,
            num_prompt_tokens=len(row.prompt.token_ids),
            num_generated=len(row.generated),
            num_cached_tokens=max(0, row.num_found),
            logprobs=tuple(row.logprobs[:num_kept]) if asked else None,
            end_logprobs=row.logprobs[-1] if asked and is_ended else None,
            prompt_logprobs=prompt_logprobs(row),
            embedding=embedding(row),
        )

    def _ends(self, row: Row, token: int) -> bool:
        return token in row.prompt.sampling.end_token_ids(self._eos_token_ids)

    def _stops(self, row: Row) -> bool:
        """Whether a stop string has just become whole: only the tail can have changed."""
        stop = row.prompt.sampling.stop
        tail = (
            max(len(text.encode("utf-8", "surrogatepass")) for text in stop) + _STOP_MARGIN_TOKENS
        )
        text = self._tokenizer.decode(row.generated[-tail:])
        if not any(word in text for word in stop):
            return False
        return self._stop_at(row, self._tokenizer.decode(row.generated)) is not None

    def _stop_at(self, row: Row, text: str) -> int | None:
        """Where the first stop string begins; one that was whole before `min_tokens` is only text."""
        sampling = row.prompt.sampling
        before = self._tokenizer.decode(row.generated[: max(0, sampling.min_tokens - 1)])
        found = (text.find(word, max(0, len(before) + 1 - len(word))) for word in sampling.stop)
        return min((at for at in found if at >= 0), default=None)
