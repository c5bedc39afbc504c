"""What a grammar forbids is taken away bit by bit, and nothing else is touched."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
import torch

from engine.compute.draws import Draw
from engine.compute.masks import forbid
from engine.config import Sampling
from engine.grammar import WORD_BITS, Mask, Matcher


class _Fixed:
    """A matcher whose mask is given."""

    def __init__(self, words: Mask) -> None:
        self._words = words
        self.followed: list[int] = []

    def follow(self, token_ids: Sequence[int]) -> None:
        self.followed = list(token_ids)

    def fill(self, mask: Mask) -> None:
        mask[:] = self._words


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1_000])
def test_each_bit_is_one_token(vocab_size: int) -> None:
    random = np.random.default_rng(vocab_size)
    num_words = -(-vocab_size // WORD_BITS)
    words = random.integers(-(2**31), 2**31, (2, num_words), np.int32)
    matchers = [_Fixed(each) for each in words]
    draws = [
        Draw(
            sampling=Sampling(max_tokens=9), generated=(4, 5), matcher=cast("Matcher", matchers[0])
        ),
        Draw(sampling=Sampling(max_tokens=9)),
        Draw(sampling=Sampling(max_tokens=9), matcher=cast("Matcher", matchers[1])),
    ]
    before = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(1))
    logits = before.clone()
    forbid(logits, draws)
    expected = before.clone()
    for row, mask in ((0, words[0]), (2, words[1])):
        for token_id in range(vocab_size):
            word = int(mask[token_id // WORD_BITS])
            if not word >> token_id % WORD_BITS & 1:
                expected[row, token_id] = float("-inf")
    assert torch.equal(logits, expected)
    assert [matcher.followed for matcher in matchers] == [[4, 5], []]
