import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.compute import sampling, truncation
from engine.compute.draws import Draw
from engine.compute.sampling import Sampled, sample
from engine.config import Sampling

EOS: Final = 1


def draw(position: int = 0, *, index: int = 0, **settings: Any) -> Draw:
    asked = dataclasses.replace(Sampling(max_tokens=10), **settings)
    return Draw(sampling=asked, index=index, prompt=(3, 4, 4), generated=range(position))


def sample_fully(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Sampled]:
    return sample(logits, draws, eos_token_ids=[EOS])


def sample_rows(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    return [sampled.token_id for sampled in sample_fully(logits, draws)]


def random_logits(num_rows: int, vocab_size: int = 50) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(7))


def test_a_greedy_row_takes_its_likeliest_token_whatever_its_seed() -> None:
    logits = random_logits(6)
    greedy = [draw(seed=seed, top_p=0.5) for seed in range(6)]
    assert sample_rows(logits, greedy) == logits.argmax(dim=-1).tolist()


EVERY_WAY: Final = (
    draw(),
    draw(logprobs=0),
    draw(seed=1, temperature=1.0),
    draw(seed=1, temperature=1.0, index=2),
    draw(4, seed=2, temperature=0.7, top_p=0.9, logprobs=3),
    draw(4, seed=2, temperature=2.0, top_p=0.999),
    draw(2, seed=3, temperature=1.2, top_k=5, top_p=0.8, logprobs=20),
    draw(2, seed=4, temperature=1.4, top_k=1400),
    draw(6, seed=5, temperature=1.0, min_p=0.2),
    draw(6, repetition_penalty=1.8, logprobs=2),
    draw(6, seed=6, temperature=0.9, frequency_penalty=1.5, presence_penalty=-0.5, logprobs=5),
    draw(1, seed=7, temperature=1.1, logit_bias=((7, 60.0), (9, -100.0)), min_tokens=3),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the latter full of equals
@given(
    rows=st.lists(st.integers(0, len(EVERY_WAY) - 1), min_size=1, max_size=20),
    rows_at_once=st.integers(1, 5),
)
def test_a_rows_token_and_logprobs_hang_on_neither_its_neighbours_nor_its_place(
    dtype: torch.dtype, rows: list[int], rows_at_once: int
) -> None:
    vocab_size = 1501
    logits = random_logits(len(EVERY_WAY), vocab_size).to(dtype)
    alone = [sample_fully(logits[row : row + 1], [draw])[0] for row, draw in enumerate(EVERY_WAY)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SAMPLING_BYTES", rows_at_once * 48 * vocab_size)
        found = sample_fully(logits[rows], [EVERY_WAY[row] for row in rows])
    assert found == [alone[row] for row in rows]


def test_the_same_seed_index_and_position_draw_the_same_and_others_draw_otherwise() -> None:
    logits = torch.zeros(1, 10_000)

    def drawn(seed: int, index: int, position: int) -> int:
        return sample_rows(logits, [draw(position, seed=seed, index=index, temperature=1.0)])[0]

    places = list(itertools.product((0, 1, 2**63, -5), range(3), range(3)))
    tokens = [drawn(*place) for place in places]
    assert tokens == [drawn(*place) for place in places]
    assert len(set(tokens)) > len(places) - 3  # of 36 draws from 10,000


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


def test_stop_tokens_are_held_back_until_min_tokens_even_where_the_end_is_ignored() -> None:
    logits = torch.zeros(3, 5)
    logits[:, 4] = 50
    logits[:, EOS] = 40
    logits[:, 2] = 30
    asked: dict[str, Any] = {"min_tokens": 3, "stop_token_ids": (4,)}
    draws = [draw(2, **asked), draw(2, ignore_eos=True, **asked), draw(3, **asked)]
    assert sample_rows(logits, draws) == [2, EOS, 4]


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


def test_a_row_of_which_every_token_is_held_back_is_refused() -> None:
    held_back = draw(min_tokens=3, stop_token_ids=tuple(range(50)))
    with pytest.raises(ValueError, match="1 of 2"):
        sample_rows(random_logits(2), [draw(), held_back])


def test_sixteen_bit_logits_are_sampled_as_their_float32_values() -> None:
    logits = random_logits(6).bfloat16()
    draws = [draw(seed=seed, temperature=0.9, top_p=0.8) for seed in range(6)]
    assert sample_rows(logits, draws) == sample_rows(logits.float(), draws)


def test_greedy_rows_that_ask_for_nothing_more_are_not_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[tuple[int, ...]] = []

    def spy(logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        copied.append(tuple(logits.shape))
        return choose(logits, *arguments, **options)

    choose = sampling._choose
    monkeypatch.setattr(sampling, "_choose", spy)
    logits = random_logits(6)
    assert sample_rows(logits, [draw()] * 6) == logits.argmax(dim=-1).tolist()
    assert copied == []
    sample_rows(logits, [draw(), draw(temperature=1.0)] * 3)
    assert copied == [(3, 50)]


def test_copies_are_made_of_no_more_rows_than_the_working_memory_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        sizes.append(sum(each.nbytes for each in arguments if isinstance(each, torch.Tensor)))
        found = truncation_weights(*arguments, **options)
        sizes.append(found.nbytes)
        return found

    truncation_weights = truncation.weights
    monkeypatch.setattr(truncation, "weights", spy)
    monkeypatch.setattr(sampling, "SAMPLING_BYTES", 1_000_000)
    draws = [draw(seed=seed, temperature=1.0, top_p=0.9) for seed in range(50)]
    sample_rows(random_logits(50, 5000), draws)
    assert len(sizes) > 20
    assert max(sizes) < 1_000_000 / 4


def test_logprobs_are_of_the_models_own_distribution_and_come_with_the_likeliest() -> None:
    logits = random_logits(3)
    draws = [
        draw(seed=1, temperature=3.0, top_k=40, logit_bias=((5, 100.0),), logprobs=4),
        draw(seed=1, temperature=3.0),
        draw(logprobs=0),
    ]
    expected = logits.double().log_softmax(dim=-1)
    biased, plain, bare = sample_fully(logits, draws)
    assert plain.logprobs is None
    assert bare.logprobs is not None
    assert (bare.logprobs.token_id, bare.logprobs.top) == (bare.token_id, ())
    assert bare.logprobs.logprob == pytest.approx(float(expected[2].max()))
    assert biased.logprobs is not None
    assert (biased.token_id, biased.logprobs.token_id) == (5, 5)
    assert biased.logprobs.logprob == pytest.approx(float(expected[0, 5]))
    values, tokens = expected[0].topk(4)
    assert [token for token, _ in biased.logprobs.top] == tokens.tolist()
    assert [value for _, value in biased.logprobs.top] == pytest.approx(values.tolist())


def test_more_likeliest_tokens_than_there_are_are_all_of_them() -> None:
    [found] = sample_fully(random_logits(1, 3), [draw(logprobs=20)])
    assert found.logprobs is not None
    assert sorted(token for token, _ in found.logprobs.top) == [0, 1, 2]
