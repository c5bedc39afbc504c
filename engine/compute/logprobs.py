"""How likely tokens were: log-softmax at chosen tokens and at the likeliest; knows no settings.

Any positions' logits will do, a generated token's or a prompt's.
"""

from collections.abc import Sequence
from typing import Final

import torch

from engine.compute.masses import log_total, masses
from engine.config import TokenLogprobs

_LOW_BITS: Final = 32
_HIGHEST_ID: Final = 2**_LOW_BITS - 1


def score(logits: torch.Tensor, token_ids: torch.Tensor, *, num_top: int) -> torch.Tensor:
    """Log-probabilities of float32 (rows, vocabulary) logits, which are left as they are.

    (rows, 1 + 2 * num_top) float64: that of the row's own of `token_ids`, the ids of the `num_top`
    likeliest tokens, and theirs. Among equals the lower id comes first.
    """
    best = logits.amax(dim=-1, keepdim=True)
    total = masses(logits - best).sum(dim=-1, keepdim=True)
    norm = best.double() + log_total(total)
    top_ids = _likeliest(logits, num_top)
    chosen = logits.gather(1, token_ids[:, None]).double() - norm
    top = logits.gather(1, top_ids).double() - norm
    return torch.cat([chosen, top_ids.double(), top], dim=1)


def read_scores(
    token_ids: Sequence[int], scores: Sequence[Sequence[float]], num_tops: Sequence[int]
) -> list[TokenLogprobs]:
    """`score`'s rows as values, each with the first `num_tops` of its likeliest tokens."""
    found = []
    for token_id, (chosen, *top), wanted in zip(token_ids, scores, num_tops, strict=True):
        half = len(top) // 2
        likeliest = zip(map(int, top[:half]), top[half:], strict=True)
        found.append(
            TokenLogprobs(token_id=token_id, logprob=chosen, top=tuple(likeliest)[:wanted])
        )
    return found


def _likeliest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """(rows, count) token ids. `topk` picks among equals as it likes, so none are left equal: the
    upper half of a key is the logit, in an order-preserving form, and the lower half the id.
    """
    if not count:
        return torch.empty((len(logits), 0), dtype=torch.long, device=logits.device)
    return ids_of(keys_of(logits).topk(count, dim=-1).values)


def keys_of(logits: torch.Tensor, *, first_id: int = 0) -> torch.Tensor:
    """int64 keys of float32 (rows, tokens) logits, larger for likelier tokens and for lower ids among
    equals; no two of a row are equal.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(first_id, first_id + logits.shape[1], device=logits.device)
    return bits.to(torch.int64).mul_(2**_LOW_BITS).add_(_HIGHEST_ID - ids)


def ids_of(keys: torch.Tensor) -> torch.Tensor:
    """The token ids that keys were made of."""
    return _HIGHEST_ID - (keys & _HIGHEST_ID)


def logits_of(keys: torch.Tensor) -> torch.Tensor:
    """The float32 logits that keys were made of."""
    bits = (keys >> _LOW_BITS).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
