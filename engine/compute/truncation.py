"""The tokens that a random row may draw, each with its weight, and the drawing; changes no logits.

In the order of vLLM: temperature, min-p, top-k, then top-p over what those left. Each is a bound:
tokens at least as likely as the bound stay, equals of the last one among them. So nothing hangs on
how a device orders equal tokens, and the vocabulary need not be sorted.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from engine.compute.draws import Draw
from engine.compute.masses import MASS_BITS, masses

_DIGITS: Final = ((20, 11), (10, 10), (0, 10))
"""Shift and width of the digits of a weight: those of its float32, which holds it exactly."""


def choose(
    logits: torch.Tensor, draws: Sequence[Draw], numbers: npt.NDArray[np.float64]
) -> torch.Tensor:
    """Tokens of float32 (rows, vocabulary) logits, which are used up, by one of `numbers` each."""
    reached = weights(logits, draws).cumsum(dim=-1)
    total = reached[:, -1:]
    shares = torch.from_numpy(numbers).to(logits.device)[:, None]
    targets = torch.minimum((shares * total).long(), total - 1)
    tokens = torch.searchsorted(reached, targets, right=True)
    return tokens[:, 0].clamp(max=logits.shape[1] - 1)  # a row of NaN is refused later


def weights(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """(rows, vocabulary) int64 masses, 0 where a row may not draw. The logits are used up."""
    temperatures = logits.new_tensor([draw.sampling.temperature for draw in draws])
    # The best token's logit becomes 0 and a temperature stays a normal float32: no 0 / 0 or inf / inf.
    limits = torch.finfo(temperatures.dtype)
    logits -= logits.amax(dim=-1, keepdim=True)
    logits /= temperatures.clamp_(min=limits.tiny, max=limits.max)[:, None]
    found = masses(logits)
    _keep_likely(found, draws)
    _keep_nucleus(found, draws)
    return found


def _keep_likely(found: torch.Tensor, draws: Sequence[Draw]) -> None:
    """min-p, a share of the likeliest token's weight, and top-k."""
    vocab_size = found.shape[1]
    bounds = found.new_tensor([int(draw.sampling.min_p * 2**MASS_BITS) for draw in draws])
    top_ks = [draw.sampling.top_k for draw in draws]
    limited = [row for row, top_k in enumerate(top_ks) if 0 < top_k < vocab_size]
    if limited:
        at = torch.tensor(limited, device=found.device)
        ranks = torch.tensor([[top_ks[row] - 1] for row in limited], device=found.device)
        likeliest = found[at].topk(max(top_ks[row] for row in limited), dim=-1).values
        bounds[at] = torch.maximum(bounds[at], likeliest.gather(1, ranks)[:, 0])
    if limited or any(draw.sampling.min_p > 0 for draw in draws):
        found.masked_fill_(found < bounds[:, None], 0)


def _keep_nucleus(found: torch.Tensor, draws: Sequence[Draw]) -> None:
    """top-p: the fewest of the likeliest tokens that together have that share of the weight."""
    limited = [row for row, draw in enumerate(draws) if draw.sampling.top_p < 1]
    if not limited:
        return
    at = torch.tensor(limited, device=found.device)
    shares = [draws[row].sampling.top_p for row in limited]
    candidates = found[at]
    total = candidates.sum(dim=-1, keepdim=True)
    shares_of_total = torch.tensor(shares, dtype=torch.float64, device=found.device)[:, None]
    wanted = (total * shares_of_total).ceil().long().clamp_(min=1)  # the likeliest always stays
    bounds = found.new_zeros(len(draws))
    bounds[at] = _bound_of_sum(candidates, wanted)
    found.masked_fill_(found < bounds[:, None], 0)


def _bound_of_sum(candidates: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(rows) weights; those as heavy or heavier come to `wanted`, (rows, 1), and without it do not.

    A radix search, the highest digit first: it sorts nothing and waits for no device.
    """
    bits = candidates.float().view(torch.int32)
    found = torch.zeros_like(wanted)
    for shift, width in _DIGITS:
        is_near = (bits >> (shift + width)) == found
        digits = ((bits >> shift) & (2**width - 1)).long()
        sums = candidates.new_zeros(len(candidates), 2**width)
        sums.scatter_add_(1, digits, candidates * is_near)
        reached = sums.flip(1).cumsum(dim=1)  # from the heaviest digit down
        num_above = (reached < wanted).sum(dim=1, keepdim=True).clamp_(max=2**width - 1)
        above = reached.gather(1, (num_above - 1).clamp_(min=0))
        wanted = wanted - above.masked_fill_(num_above == 0, 0)
        found = (found << width) | (2**width - 1 - num_above)
    return found.int().view(torch.float32).long()[:, 0]
