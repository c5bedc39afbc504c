import numpy as np
import pytest

from engine.compute.draws import Draw, philox, uniforms
from engine.config import Sampling

# The known answers that Random123 publishes for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_philox_gives_the_published_answers() -> None:
    counters = np.array([words(counter) for counter, _, _ in KNOWN_ANSWERS], np.uint64).T
    keys = np.array([words(key) for _, key, _ in KNOWN_ANSWERS], np.uint64).T
    found = philox(counters, keys).T.tolist()
    assert found == [words(answer) for _, _, answer in KNOWN_ANSWERS]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64, -1])
def test_numbers_are_even_over_positions_and_samples_and_lie_below_one(seed: int) -> None:
    draws = [
        Draw(sampling=Sampling(max_tokens=1, seed=seed), index=index, generated=range(position))
        for index in range(40)
        for position in range(50)
    ]
    numbers = uniforms(draws)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(set(numbers.tolist())) == len(draws)
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert ((counts - 100) ** 2 / 100).sum() < 50  # 19 degrees of freedom: 1 honest seed in 7,000


def test_a_seed_counts_modulo_two_to_the_64th() -> None:
    def number(seed: int) -> float:
        return float(uniforms([Draw(sampling=Sampling(max_tokens=1, seed=seed))])[0])

    assert number(-1) == number(2**64 - 1)
    assert len({number(seed) for seed in (0, 1, 2**32, 2**63, -1)}) == 5
