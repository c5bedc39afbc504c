"""Which prompts can run on a model, alone in an empty block, and what each that cannot is told. Knows no
rows and no weights.
"""

from collections.abc import Collection

from engine.compute.limits import Readable, check_reading, check_sampling
from engine.config import Prompt
from engine.errors import GrammarError, PromptError
from engine.grammar import Grammars, Matcher


class Admission:
    """`max_context_tokens` are the model's, or as many as any tier has room for."""

    def __init__(
        self,
        *,
        vocab_size: int,
        max_context_tokens: int,
        eos_token_ids: Collection[int],
        grammars: Grammars,
        readable: Readable,
    ) -> None:
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._eos_token_ids = eos_token_ids
        self._grammars = grammars
        self._readable = readable

    def check(self, prompt: Prompt) -> None:
        """Raises PromptError with the first fault."""
        token_ids, max_tokens = prompt.token_ids, prompt.sampling.max_tokens
        if not token_ids:
            raise PromptError("The prompt is empty.", code="invalid_value", param="prompt")
        check_sampling(
            prompt.sampling, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids
        )
        check_reading(prompt.reading, self._readable)
        if len(token_ids) + max_tokens > self._max_context_tokens:
            raise PromptError(
                f"This model's maximum context length is {self._max_context_tokens} tokens. "
                f"However, {len(token_ids) + max_tokens} were asked for ({len(token_ids)} in the "
                f"prompt, {max_tokens} in the completion).",
                code="context_length_exceeded",
                param="prompt",
            )
        unknown = [token for token in token_ids if not 0 <= token < self._vocab_size]
        if unknown:
            raise PromptError(
                f"Token id {unknown[0]} is not in the vocabulary of {self._vocab_size} tokens.",
                code="invalid_value",
                param="prompt",
            )
        self.matcher(prompt)

    def matcher(self, prompt: Prompt) -> Matcher | None:
        """A new one, if the prompt has a grammar. Raises PromptError if it cannot be honoured."""
        grammar = prompt.sampling.grammar
        if grammar is None:
            return None
        try:
            return self._grammars.matcher(grammar)
        except GrammarError as error:
            raise PromptError(
                f"Invalid 'response_format': {error}.",
                code="invalid_value",
                param="response_format",
            ) from error
