"""What a row may say, as a grammar: checked, compiled, and followed token by token. No logits.

The grammars are llguidance's: a JSON schema, or its own dialect of Lark.
"""

import collections
import functools
import json
from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from engine.config import Grammar, GrammarKind
from engine.errors import GrammarError, TokenizerError

WORD_BITS: Final = 32
_MAX_COMPILED: Final = 256

_JSON_OPTIONS: Final[Any] = {  # its type is in the library's stubs alone
    "item_separator": ",",
    "key_separator": ":",
    # One blank at most between tokens of JSON: a model that likes blanks could go on for ever.
    "whitespace_flexible": True,
    "whitespace_pattern": " ?",
    "coerce_one_of": False,
    "lenient": False,
}
"""Written over whatever a schema asks for under llguidance's own key `x-guidance`."""

Mask = npt.NDArray[np.int32]


class TokenTable(Protocol):
    """What grammars need of `engine.tokenizer.Tokenizer`."""

    @property
    def num_tokens(self) -> int: ...
    def serialized(self) -> str: ...


@functools.lru_cache(maxsize=_MAX_COMPILED)
def check_grammar(grammar: Grammar) -> None:
    """Needs no tokenizer. Raises GrammarError with what cannot be honoured."""
    message = LLMatcher.validate_grammar(_source(grammar))
    if message:
        raise GrammarError(_first_line(message))


class Matcher:
    """Where one row stands in its grammar: a function of the grammar and the row's tokens alone.

    A grammar that grows beyond the library's limits on the way is at `fault` and allows all.
    """

    def __init__(self, matcher: LLMatcher, *, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words
        self._num_followed = 0

    @property
    def fault(self) -> str | None:
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def follow(self, token_ids: Sequence[int]) -> None:
        """Stand after all of `token_ids`, of which those that were followed before are known."""
        coming = list(token_ids[self._num_followed :])
        self._num_followed = len(token_ids)
        if coming:
            self._matcher.consume_tokens(coming)

    def is_complete(self) -> bool:
        """Whether nothing but an end can come."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def fill(self, mask: Mask) -> None:
        """Set the bit of each token that may come next, the lowest bit of the first word first;
        end-of-sequence tokens where the grammar may end. `mask` is (words,).
        """
        found = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        if self._matcher.is_error():
            mask[:] = -1
            return
        num_words = min(self._num_words, len(found))
        mask[:num_words] = found[:num_words]
        mask[num_words:] = 0


class Grammars:
    """Grammars over one tokenizer's tokens; each is compiled once while it is in use."""

    def __init__(
        self, tokenizer: TokenTable, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._library: LLTokenizer | None = None
        self._compiled: collections.OrderedDict[Grammar, LLMatcher] = collections.OrderedDict()

    def matcher(self, grammar: Grammar) -> Matcher:
        """At its beginning. Raises GrammarError for a grammar or a tokenizer that will not do."""
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = LLMatcher(self._tokens(), _source(grammar), log_level=0)
            if compiled.is_error():
                raise GrammarError(_first_line(compiled.get_error()))
            self._compiled[grammar] = compiled
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)
        num_words = -(-self._vocab_size // WORD_BITS)
        return Matcher(compiled.deep_copy(), num_words=num_words)

    def _tokens(self) -> LLTokenizer:
        if self._library is None:
            try:
                text = self._tokenizer.serialized()
            except TokenizerError as error:
                raise GrammarError(str(error)) from error
            num_tokens = max(self._vocab_size, self._tokenizer.num_tokens)
            self._library = LLTokenizer(text, n_vocab=num_tokens, eos_token=self._eos_token_ids)
        return self._library


def _source(grammar: Grammar) -> str:
    if grammar.kind is GrammarKind.LARK:
        return LLMatcher.grammar_from_lark(grammar.text)
    try:
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise GrammarError(_first_line(str(error))) from error


def embedded(schema: object) -> str:
    """A JSON schema as text that stands in a Lark grammar, to be read as one that stands alone."""
    fields = schema if isinstance(schema, dict) else {}
    return f"%json {json.dumps({**fields, 'x-guidance': _JSON_OPTIONS})}"


def _first_line(message: str) -> str:
    return message.strip().split("\n", 1)[0][:500]
