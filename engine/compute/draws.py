"""What a row asks of its next token, and the random number that is its own; knows no logits."""

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from engine.config import Sampling
from engine.grammar import Matcher

_ROUNDS: Final = 10
_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS: Final = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_WORD: Final = np.uint64(2**32 - 1)
_WORD_BITS: Final = np.uint64(32)

Words = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One row's wish for its next token. `index` tells the completions of one prompt apart.

    `prompt` and `generated` are the token ids before it, read and not kept. `matcher` is the row's
    own, if its settings have a grammar.
    """

    sampling: Sampling
    index: int = 0
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()
    matcher: Matcher | None = None

    @property
    def position(self) -> int:
        return len(self.generated)


def uniforms(draws: Sequence[Draw]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each row, of 53 bits.

    Counter-based: a function of (seed, index, position) alone, so that a row that is computed
    again, elsewhere or in other company, draws the same.
    """
    seeds = np.array([draw.sampling.seed % 2**64 for draw in draws], dtype=np.uint64)
    counters = np.zeros((4, len(draws)), dtype=np.uint64)
    counters[0] = [draw.position for draw in draws]
    counters[1] = [draw.index for draw in draws]
    words = philox(counters, np.stack([seeds & _WORD, seeds >> _WORD_BITS]))
    bits = (words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))
    numbers: npt.NDArray[np.float64] = np.ldexp(bits.astype(np.float64), -53)
    return numbers


def philox(counters: Words, keys: Words) -> Words:
    """Philox4x32-10 (Salmon et al. 2011): (4, rows) counters and (2, rows) keys to (4, rows) words.

    All of them are 32-bit words, held in 64 bits for the sake of their products.
    """
    a, b, c, d = counters
    low, high = keys
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (second >> _WORD_BITS) ^ b ^ low, second & _WORD
        c, d = (first >> _WORD_BITS) ^ d ^ high, first & _WORD
        low, high = (low + _KEY_STEPS[0]) & _WORD, (high + _KEY_STEPS[1]) & _WORD
    return np.stack([a, b, c, d])
