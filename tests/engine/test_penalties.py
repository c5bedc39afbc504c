"""Oracle: the library's processors, and OpenAI's formula written out."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from engine.compute.draws import Draw
from engine.compute.penalties import change_logits, changes_logits
from engine.config import Sampling

VOCAB_SIZE: Final = 30
EOS: Final = 1
PROMPT: Final = (3, 4, 4, 9, 3)
GENERATED: Final = (9, 7, 7, 7, 2)


def draw(
    *, prompt: Sequence[int] = PROMPT, generated: Sequence[int] = GENERATED, **settings: Any
) -> Draw:
    asked = dataclasses.replace(Sampling(max_tokens=10), **settings)
    return Draw(sampling=asked, prompt=prompt, generated=generated)


def random_logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))


def changed(logits: torch.Tensor, *draws: Draw) -> torch.Tensor:
    found = logits.clone()
    change_logits(found, draws, eos_token_ids=[EOS])
    return found


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_repetition_is_penalised_as_the_library_does_over_prompt_and_generated(
    penalty: float,
) -> None:
    logits = random_logits(1)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([[*PROMPT, *GENERATED]]), logits.clone())
    found = changed(logits, draw(repetition_penalty=penalty))
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    assert not torch.equal(found, logits)


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, 0.8), (-1.5, 2.0)])
def test_counts_are_penalised_by_openais_formula_over_generated_tokens_alone(
    frequency: float, presence: float
) -> None:
    logits = random_logits(1)
    expected = logits.clone()
    for token in range(VOCAB_SIZE):
        count = GENERATED.count(token)
        expected[0, token] -= count * frequency + (count > 0) * presence
    found = changed(logits, draw(frequency_penalty=frequency, presence_penalty=presence))
    torch.testing.assert_close(found, expected)


def test_a_bias_is_added_and_minus_100_bans() -> None:
    logits = random_logits(2)
    found = changed(logits, draw(), draw(logit_bias=((4, 2.5), (20, -100.0))))
    expected = logits.clone()
    expected[1, 4] += 2.5
    expected[1, 20] -= 100
    assert torch.equal(found, expected)
    assert found[1].softmax(dim=-1)[20] < 1e-30


def test_changes_come_in_order_and_in_their_own_rows_only() -> None:
    logits = random_logits(5)
    settings: dict[str, Any] = {
        "logit_bias": ((7, 1.0), (12, 3.0)),
        "repetition_penalty": 2.0,
        "frequency_penalty": 0.25,
        "presence_penalty": 0.5,
        "min_tokens": 9,
        "stop_token_ids": (7, 28),
    }
    plain = draw()
    found = changed(logits, plain, draw(**settings), plain, draw(repetition_penalty=3.0), plain)
    assert torch.equal(found[[0, 2, 4]], logits[[0, 2, 4]])
    alone = changed(logits[1:2], draw(**settings))
    assert torch.equal(found[1:2], alone)
    expected = logits[1].clone()
    expected[[EOS, 7, 28]] = -torch.inf
    expected[[7, 12]] += torch.tensor([1.0, 3.0])
    for token in {*PROMPT, *GENERATED}:
        expected[token] *= 0.5 if expected[token] > 0 else 2.0
    for token in set(GENERATED):
        expected[token] -= 0.25 * GENERATED.count(token) + 0.5
    torch.testing.assert_close(found[1], expected)


NEUTRAL: Final[dict[str, tuple[dict[str, Any], bool]]] = {
    "nothing": ({}, False),
    "a temperature": ({"temperature": 1.0, "top_p": 0.5}, False),
    "min_tokens that are there": ({"min_tokens": 5}, False),
    "min_tokens that are not": ({"min_tokens": 6}, True),
    "no end to hold back": ({"min_tokens": 6, "ignore_eos": True}, False),
    "a stop token to hold back": (
        {"min_tokens": 6, "ignore_eos": True, "stop_token_ids": (3,)},
        True,
    ),
    "a bias": ({"logit_bias": ((3, 1.0),)}, True),
    "a presence penalty": ({"presence_penalty": 0.1}, True),
    "a presence penalty of nothing": ({"presence_penalty": 0.1, "generated": ()}, False),
    "a repetition penalty": ({"repetition_penalty": 1.1, "generated": ()}, True),
}


@pytest.mark.parametrize("case", NEUTRAL.values(), ids=NEUTRAL)
def test_logits_are_said_to_change_exactly_where_they_do(case: tuple[dict[str, Any], bool]) -> None:
    settings, expected = case
    logits = random_logits(1)
    assert changes_logits(draw(**settings), [EOS]) == expected
    assert torch.equal(changed(logits, draw(**settings)), logits) != expected
