"""Oracle: the library's own warpers, in the order of vLLM."""

import dataclasses
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.compute.draws import Draw
from engine.compute.truncation import choose, weights
from engine.config import Sampling

SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "nothing": {},
    "temperature": {"temperature": 0.3},
    "top_k 1": {"top_k": 1},
    "top_k 7": {"top_k": 7},
    "top_k of more than there are": {"top_k": 10**9},
    "narrow top_p": {"top_p": 0.2},
    "top_p": {"top_p": 0.8, "temperature": 0.7},
    "top_p of most of a flat row": {"top_p": 0.99, "temperature": 5.0},
    "min_p": {"min_p": 0.05},
    "min_p 1": {"min_p": 1.0},
    "top_k then top_p": {"top_k": 20, "top_p": 0.6, "temperature": 1.5},
    "min_p then top_p": {"min_p": 0.1, "top_p": 0.7},
    "all": {"min_p": 0.02, "top_k": 30, "top_p": 0.9, "temperature": 1.3},
    "min_p is the narrower": {"min_p": 0.9, "top_k": 30},
}


def draw(**settings: Any) -> Draw:
    asked = dataclasses.replace(Sampling(max_tokens=10, temperature=1.0), **settings)
    return Draw(sampling=asked)


def random_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    return 2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(3))


def oracle(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    warped: torch.Tensor = warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits)
    return warped.softmax(dim=-1)


@pytest.mark.parametrize("vocab_size", [40, 5000])
def test_what_a_row_may_draw_is_what_the_librarys_warpers_leave(vocab_size: int) -> None:
    draws = [draw(**settings) for settings in SETTINGS.values()]
    logits = random_logits(len(draws), vocab_size)
    found = weights(logits.clone(), draws).double()
    found /= found.sum(dim=-1, keepdim=True)
    for row, (name, each) in enumerate(zip(SETTINGS, draws, strict=True)):
        expected = oracle(logits[row : row + 1], each.sampling)[0].double()
        # Weights are whole numbers: the lightest tokens are rounded away.
        assert bool((expected[found[row] > 0] > 0).all()), name
        assert bool((found[row][expected > 1e-9] > 0).all()), name
        torch.testing.assert_close(found[row], expected, atol=2e-7, rtol=1e-4, msg=name)


@given(
    steps=st.lists(st.integers(-40, 40), min_size=1, max_size=60),
    top_p=st.floats(0, 1),
    scale=st.sampled_from([0.001, 0.1, 1.0]),
)
def test_a_nucleus_is_the_fewest_of_the_likeliest_and_equals_of_the_last(
    steps: list[int], top_p: float, scale: float
) -> None:
    logits = torch.tensor([steps], dtype=torch.float32) * scale
    [every] = weights(logits.clone(), [draw()]).tolist()
    ordered = sorted(every, reverse=True)
    count = next(
        (count for count in range(1, len(ordered)) if sum(ordered[:count]) >= top_p * sum(ordered)),
        len(ordered),
    )
    [found] = weights(logits, [draw(top_p=top_p)]).tolist()
    assert found == [weight if weight >= ordered[count - 1] else 0 for weight in every]


def test_equals_of_the_last_token_that_stays_stay_with_it() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 2.0, 2.0, 1.0]])
    for settings in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}):
        kept = weights(logits.clone(), [draw(**settings)])[0] > 0
        assert kept.tolist() == [False, True, True, True, True, False], settings


def test_the_number_falls_into_a_tokens_share_of_the_line_in_order_of_the_vocabulary() -> None:
    logits = torch.tensor([[0.1, 0.0, 0.4, 0.3, 0.2]]).log()  # one of them may not be drawn
    edges = [0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.7999, 0.8001, 1 - 2**-53]
    numbers = np.array(edges)
    tokens = choose(logits.repeat(len(edges), 1), [draw()] * len(edges), numbers)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3, 4, 4]
