"""From a line's completions, as they come, to the body that answers it; knows no ledger and no file."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any, Final

from engine.config import Completion, FinishReason, TokenLogprobs
from jobs.answers import Answer, Choice, TokenScore, Usage, answer_body
from jobs.batch import Endpoint
from jobs.embeddings import embeddings_body
from jobs.prompts import PromptText
from jobs.responses import response_body
from worker.render import Origin, Rendered, TextTokenizer, parse_row_key
from worker.tool_calls.base import Said

BROKEN: Final = "The server had an error while processing this request."
UNFOLLOWED: Final = "The server could not keep the answer to its schema any further."


class Gathering:
    """One line's completions until all are there. One that comes twice counts once."""

    def __init__(self, rendered: Rendered) -> None:
        self.rendered = rendered
        self._found: dict[tuple[int, int], Completion] = {}

    def add(self, completion: Completion) -> bool:
        """Whether it was the last one."""
        _, _, part = parse_row_key(completion.key)
        self._found[part, completion.index] = completion
        return len(self._found) == len(self.rendered.prompts) * self.rendered.ask.num_texts

    @property
    def chosen(self) -> list[Completion]:
        """Those that are answered, in order of prompts; the likeliest first if there was a choice."""
        found = [self._found[place] for place in sorted(self._found)]
        ask = self.rendered.ask
        if ask.max_tokens == 0:
            return [each for each in found for _ in range(ask.n)]
        if ask.best_of is None:
            return found
        parts = [found[at : at + ask.best_of] for at in range(0, len(found), ask.best_of)]
        ranked = [sorted(part, key=_mean_logprob, reverse=True) for part in parts]
        return [each for part in ranked for each in part[: ask.n]]

    @property
    def embeddings(self) -> list[bytes]:
        """In order of prompts."""
        return [self._found[place].embedding or b"" for place in sorted(self._found)]

    def prompt_logprobs(self, part: int) -> tuple[TokenLogprobs, ...]:
        """Of the tokens after the first of a prompt that was scored."""
        return self._found[part, 0].prompt_logprobs or ()

    @property
    def is_faulty(self) -> bool:
        """Whether one of them is worth nothing."""
        return any(each.finish_reason is FinishReason.FAULT for each in self._found.values())

    @property
    def usage(self) -> Usage:
        firsts = [each for each in self._found.values() if each.index == 0]
        return Usage(
            input_tokens=sum(each.num_prompt_tokens for each in firsts),
            cached_tokens=sum(each.num_cached_tokens for each in firsts),
            output_tokens=sum(each.num_generated for each in self._found.values()),
        )


class Answerer:
    """`fingerprint` is the engine's."""

    def __init__(self, tokenizer: TextTokenizer, *, fingerprint: str) -> None:
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        self._special: dict[int, str | None] = {}
        """What special tokens are called, as far as it was asked; None for all others."""

    def body(self, origin: Origin, line_index: int, gathered: Gathering) -> dict[str, Any]:
        """The response body of a line whose completions are all there."""
        embedding = gathered.rendered.ask.embedding
        if embedding is not None:
            return embeddings_body(
                gathered.embeddings,
                encoding_format=embedding.encoding_format,
                model=origin.model or "",
                num_tokens=gathered.usage.input_tokens,
            )
        answer = Answer(
            batch_id=origin.id,
            line_index=line_index,
            model=origin.model or "",
            fingerprint=self._fingerprint,
            created_at=int(time.time()),
            choices=tuple(self._choice(gathered, each) for each in gathered.chosen),
            usage=gathered.usage,
            echoed=gathered.rendered.ask.echoed,
        )
        if origin.endpoint is Endpoint.RESPONSES:
            return response_body(answer)
        return answer_body(answer, origin.endpoint)

    def _choice(self, gathered: Gathering, completion: Completion) -> Choice:
        rendered = gathered.rendered
        is_asked = completion.logprobs is not None and rendered.ask.logprobs is not None
        scores = self._scores(completion.logprobs or ()) if is_asked else None
        if scores is not None and rendered.ask.stop:
            scores = _said(scores, completion.text)
        if scores is not None and rendered.ask.echo:
            scores = self._with_prompt(gathered, completion, scores)
        said = self._said_of(rendered, completion)
        reason = completion.finish_reason.value
        if said.calls and completion.finish_reason is FinishReason.STOP:
            reason = "tool_calls"
        text = self._echoed(rendered, completion) + said.text
        return Choice(text=text, finish_reason=reason, scores=scores, tool_calls=said.calls)

    def _echoed(self, rendered: Rendered, completion: Completion) -> str:
        if not rendered.ask.echo:
            return ""
        _, _, part = parse_row_key(completion.key)
        prompt = rendered.ask.prompts[part]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _with_prompt(
        self, gathered: Gathering, completion: Completion, scores: tuple[TokenScore, ...]
    ) -> tuple[TokenScore, ...]:
        """The prompt's tokens before those generated, and the one that ended them after: whoever asks
        for one more token than the prompt has finds one more.
        """
        _, _, part = parse_row_key(completion.key)
        text, ids = gathered.rendered.ask.prompts[part], gathered.rendered.prompts[part].token_ids
        told = [self._score(ids[0], None), *self._scores(gathered.prompt_logprobs(part))]
        prompt = [
            dataclasses.replace(score, is_shown=self._is_shown(token_id, text))
            for token_id, score in zip(ids, told, strict=True)
        ]
        end = [completion.end_logprobs] if completion.end_logprobs is not None else []
        return (*prompt, *scores, *self._scores(end))

    def _is_shown(self, token_id: int, text: PromptText) -> bool:
        """Whether an echo has the token: special ones only where the text itself has them."""
        if token_id not in self._special:
            name = self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
            is_special = self._tokenizer.special_token_id(name) == token_id
            self._special[token_id] = name if is_special else None
        special = self._special[token_id]
        return special is None or (isinstance(text, str) and special in text)

    def _said_of(self, rendered: Rendered, completion: Completion) -> Said:
        """Calls are looked for where some may be, in the text with its special tokens."""
        if rendered.family is None:
            return Said(text=completion.text, calls=())
        whole = self._tokenizer.decode(completion.token_ids, skip_special_tokens=False)
        ends = [at for stop in rendered.ask.stop if (at := whole.find(stop)) >= 0]
        said = rendered.family.read(whole[: min(ends, default=None)])
        return said if said.calls else Said(text=completion.text, calls=())

    def _scores(self, scores: Sequence[TokenLogprobs]) -> tuple[TokenScore, ...]:
        return tuple(
            dataclasses.replace(
                self._score(score.token_id, score.logprob),
                top=tuple(self._score(*likely) for likely in score.top),
            )
            for score in scores
        )

    def _score(self, token_id: int, logprob: float | None) -> TokenScore:
        return TokenScore(raw=self._tokenizer.token_bytes(token_id), logprob=logprob)


def _mean_logprob(completion: Completion) -> float:
    scores = completion.logprobs or ()
    return sum(score.logprob for score in scores) / max(1, len(scores))


def _said(scores: tuple[TokenScore, ...], text: str) -> tuple[TokenScore, ...]:
    """Those of the tokens that the text is made of: a stop string is not in it."""
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    ends = itertools.accumulate(len(score.raw) for score in scores)
    starts = (0, *ends)
    return tuple(score for score, start in zip(scores, starts, strict=False) if start < num_bytes)
