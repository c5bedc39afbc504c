"""Logits to tokens, row by row: a row's token depends on its own logits, settings and position."""

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from engine.config import Sampling

_SEED_BITS: Final = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One row's wish for its next token. `position` counts the tokens generated before it."""

    sampling: Sampling
    position: int


def sample(
    logits: torch.Tensor, draws: Sequence[Draw], *, eos_token_ids: Sequence[int]
) -> list[int]:
    """Next tokens of (rows, vocabulary) logits. Raises ValueError for a row without finite logits.

    Randomness is counter-based: the number drawn is a function of (seed, position) alone, so that
    a row that is computed again, elsewhere or in other company, draws the same.
    """
    logits = logits.float()
    held_back = [
        row
        for row, draw in enumerate(draws)
        if draw.position < draw.sampling.min_tokens and not draw.sampling.ignore_eos
    ]
    if held_back and eos_token_ids:
        at = torch.tensor(held_back, device=logits.device)
        columns = torch.tensor(list(eos_token_ids), device=logits.device)
        logits = logits.clone()
        logits[at[:, None], columns] = float("-inf")
    tokens = logits.argmax(dim=-1)
    _require_finite(logits, tokens)
    random_rows = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if random_rows:
        at = torch.tensor(random_rows, device=logits.device)
        chosen = _sample_random(logits[at], [draws[row] for row in random_rows])
        tokens[at] = chosen
    return [int(token) for token in tokens.tolist()]


def _require_finite(logits: torch.Tensor, tokens: torch.Tensor) -> None:
    best = logits.gather(1, tokens[:, None])
    if not bool(torch.isfinite(best).all()):
        bad = int((~torch.isfinite(best)).sum())
        raise ValueError(f"{bad} of {len(tokens)} rows have no finite logit")


def _sample_random(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Inverse-CDF sampling over the nucleus of each row, most likely token first."""
    temperatures = logits.new_tensor([draw.sampling.temperature for draw in draws])
    top_ps = logits.new_tensor([draw.sampling.top_p for draw in draws])
    uniforms = torch.tensor([_uniform(draw) for draw in draws], dtype=torch.float64)
    # The best token's logit becomes 0 and the smallest temperature a float32: no overflow, no 0 / 0.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    temperatures = temperatures.clamp(min=torch.finfo(temperatures.dtype).tiny)
    weights = torch.softmax(logits / temperatures[:, None], dim=-1)
    ordered, tokens = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    # A token is in the nucleus while those before it have not reached top_p; the first always is.
    ordered = ordered.masked_fill((before >= top_ps[:, None]) & (before > 0), 0.0).double()
    reached = ordered.cumsum(dim=-1)
    targets = uniforms.to(reached.device)[:, None] * reached[:, -1:]
    picked = (reached <= targets).sum(dim=-1, keepdim=True)
    return tokens.gather(1, picked.clamp(max=logits.shape[-1] - 1))[:, 0]


def _uniform(draw: Draw) -> float:
    key = draw.sampling.seed % 2**_SEED_BITS
    counter = np.array([draw.position, 0, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())
