import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.compute.sampling import Draw, sample
from engine.config import Sampling

EOS: Final = 1


def draw(position: int = 0, **settings: Any) -> Draw:
    sampling = dataclasses.replace(Sampling(max_tokens=10), **settings)
    return Draw(sampling=sampling, position=position)


def sample_rows(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    return sample(logits, draws, eos_token_ids=[EOS])


def random_logits(num_rows: int, vocab_size: int = 50) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(7))


def test_a_greedy_row_takes_its_likeliest_token_whatever_its_seed() -> None:
    logits = random_logits(6)
    greedy = [draw(seed=seed, top_p=0.5) for seed in range(6)]
    assert sample_rows(logits, greedy) == logits.argmax(dim=-1).tolist()


@given(order=st.permutations(range(8)), company=st.integers(1, 8))
def test_a_rows_token_hangs_on_neither_its_neighbours_nor_its_place(
    order: list[int], company: int
) -> None:
    logits = random_logits(8)
    draws = [
        draw(position=row, seed=row % 3, temperature=0.4 * (row % 4), top_p=1 - 0.1 * (row % 5))
        for row in range(8)
    ]
    alone = [sample_rows(logits[row : row + 1], [draws[row]])[0] for row in range(8)]
    chosen = order[:company]
    found = sample_rows(logits[chosen], [draws[row] for row in chosen])
    assert found == [alone[row] for row in chosen]


def test_the_same_seed_and_position_draw_the_same_and_others_draw_otherwise() -> None:
    logits = torch.zeros(1, 1000)

    def drawn(seed: int, position: int) -> int:
        return sample_rows(logits, [draw(position, seed=seed, temperature=1.0)])[0]

    places = [(seed, position) for seed in (0, 1, 2**63, -5) for position in range(8)]
    tokens = [drawn(*place) for place in places]
    assert tokens == [drawn(*place) for place in places]
    assert len(set(tokens)) > 28  # of 32 draws from 1000


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_tokens_come_as_often_as_temperature_and_nucleus_say(
    temperature: float, top_p: float
) -> None:
    num_draws = 6000
    logits = torch.tensor([0.3, 1.5, -0.7, 0.9, 2.0, -3.0])
    weights = (logits.double() / temperature).softmax(dim=-1)
    ranked = sorted(range(len(logits)), key=lambda token: -weights[token])
    nucleus: list[int] = []
    while sum(float(weights[token]) for token in nucleus) < top_p - 1e-9:
        nucleus.append(ranked[len(nucleus)])
    total = sum(float(weights[token]) for token in nucleus)
    draws = [
        draw(position, seed=3, temperature=temperature, top_p=top_p)
        for position in range(num_draws)
    ]
    tokens = sample_rows(logits.expand(num_draws, -1), draws)
    assert set(tokens) <= set(nucleus)
    expected = {token: num_draws * float(weights[token]) / total for token in nucleus}
    chi_square = sum(
        (tokens.count(token) - count) ** 2 / count for token, count in expected.items()
    )
    assert chi_square < 25  # 5 degrees of freedom: one honest seed in 7,000 is beyond


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_a_nucleus_of_nothing_still_holds_the_likeliest_token(top_p: float) -> None:
    logits = random_logits(5)
    draws = [draw(seed=seed, temperature=2.0, top_p=top_p) for seed in range(5)]
    assert sample_rows(logits, draws) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-4, 1e-39, 1e-300])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float) -> None:
    logits = random_logits(5)
    draws = [draw(seed=seed, temperature=temperature) for seed in range(5)]
    assert sample_rows(logits, draws) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_end_is_held_back_until_min_tokens_unless_it_is_ignored(temperature: float) -> None:
    logits = torch.zeros(4, 5)
    logits[:, EOS] = 50
    logits[:, 3] = 25
    draws = [
        draw(position, seed=position, temperature=temperature, min_tokens=3, ignore_eos=ignored)
        for position, ignored in [(2, False), (3, False), (2, True), (0, False)]
    ]
    before = logits.clone()
    assert sample_rows(logits, draws) == [3, EOS, EOS, 3]
    assert torch.equal(logits, before), "the caller's logits are left as they were"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_finite_best_logit_is_refused_and_counted(
    bad: float, temperature: float
) -> None:
    logits = random_logits(3)
    logits[1] = bad
    with pytest.raises(ValueError, match="1 of 3 rows have no finite logit"):
        sample_rows(logits, [draw(temperature=temperature)] * 3)


def test_one_bad_logit_among_good_ones_is_enough_to_refuse_the_row() -> None:
    logits = random_logits(2)
    logits[0, 4] = torch.nan
    with pytest.raises(ValueError, match="1 of 2"):
        sample_rows(logits, [draw()] * 2)


def test_sixteen_bit_logits_are_sampled_as_their_float32_values() -> None:
    logits = random_logits(6).bfloat16()
    draws = [draw(seed=seed, temperature=0.9, top_p=0.8) for seed in range(6)]
    assert sample_rows(logits, draws) == sample_rows(logits.float(), draws)
