"""What tests of scored and embedded prompts share: prompts of all kinds, and what the library says."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pytest
import torch

from engine.config import Embedding, Pooling, Prompt, Sampling, Scoring, TokenLogprobs
from tests.support.tiny_models import VOCAB_SIZE

_TOLERANCE: Final = 1e-4


def prompts() -> list[Prompt]:
    """Rows of all kinds that begin alike, so that there is something to share."""
    draw = random.Random(5)
    common = tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(40))

    def prompt(key: str, num_own: int, max_tokens: int, reading: Any = None) -> Prompt:
        own = tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(num_own))
        sampling = Sampling(max_tokens=max_tokens, logprobs=1 if max_tokens else None)
        return Prompt(key=key, token_ids=common + own, sampling=sampling, reading=reading)

    alone = Prompt(key="one token", token_ids=(7,), sampling=Sampling(max_tokens=0))
    return [
        prompt("plain", 9, 4),
        prompt("scored", 5, 0, Scoring(num_top=3)),
        prompt("scored and gone on", 3, 6, Scoring()),
        prompt("the last", 11, 0, Embedding()),
        prompt("all of them", 7, 0, Embedding(pooling=Pooling.MEAN)),
        prompt("a part of the last", 4, 3, Embedding(dimensions=5)),
        prompt("plain again", 2, 5),
        prompt("scored by twenty", 26, 0, Scoring(num_top=20)),
        dataclasses.replace(alone, reading=Scoring(num_top=2)),
        dataclasses.replace(alone, key="nothing asked"),
    ]


def require_scores(model: Any, prompt: Prompt, told: Sequence[TokenLogprobs] | None) -> None:
    """`model` is the library's, with its head."""
    assert isinstance(prompt.reading, Scoring)
    assert told is not None
    assert [each.token_id for each in told] == list(prompt.token_ids[1:])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt.token_ids]), use_cache=False).logits[0]
    expected = logits.double().log_softmax(dim=-1)
    for at, each in enumerate(told):
        assert each.logprob == pytest.approx(float(expected[at, each.token_id]), abs=_TOLERANCE)
        values, ids = expected[at].topk(prompt.reading.num_top)
        assert [token for token, _ in each.top] == ids.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=_TOLERANCE)


def require_embedding(bare: Any, prompt: Prompt, told: bytes | None) -> None:
    """`bare` is the library's model without its head."""
    assert isinstance(prompt.reading, Embedding)
    assert told is not None
    with torch.inference_mode():
        ids = torch.tensor([prompt.token_ids])
        states = bare(input_ids=ids, use_cache=False).last_hidden_state[0].double()
    is_mean = prompt.reading.pooling is Pooling.MEAN
    pooled = (states.mean(dim=0) if is_mean else states[-1])[: prompt.reading.dimensions]
    found = np.frombuffer(told, dtype="<f4")
    assert found.shape == pooled.shape
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    assert found == pytest.approx((pooled / pooled.norm()).numpy(), abs=_TOLERANCE)
