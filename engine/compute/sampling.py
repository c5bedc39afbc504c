"""Logits to tokens, row by row: a row's token depends on its own logits, settings and past.

Logits are read where they are; rows that need a copy of theirs get it a few at a time.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch

from engine.compute.draws import Draw, uniforms
from engine.compute.logprobs import read_scores, score
from engine.compute.penalties import change_logits, changes_logits
from engine.compute.truncation import choose
from engine.config import TokenLogprobs
from engine.planning.cost import SAMPLING_BYTES

_BYTES_PER_LOGIT: Final = 48
"""Of a copied row at worst: its float32, its weights, those of its nucleus, their digits and sums."""


class Sampled(NamedTuple):
    """A row's next token, and how likely it was where that was asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def sample(
    logits: torch.Tensor, draws: Sequence[Draw], *, eos_token_ids: Sequence[int]
) -> list[Sampled]:
    """Next tokens of (rows, vocabulary) logits of any float type, which are left as they are.

    Log-probabilities are of the model's own distribution: of the log-softmax of the logits before
    bias, penalties, temperature and truncation, as OpenAI gives them and vLLM by default.
    One copy brings the results from the device. Raises ValueError for rows without finite logits.
    """
    tokens = logits.argmax(dim=-1)
    is_sound = logits.gather(1, tokens[:, None])[:, 0].isfinite()
    for rows in _wilful(draws, eos_token_ids):
        for some in _chunks(rows, logits.shape[1]):
            at = torch.tensor(some, device=logits.device)
            copied, own = logits[at].float(), [draws[row] for row in some]
            tokens[at], found = _choose(copied, own, eos_token_ids)
            is_sound[at] &= found
    scored = [row for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    num_tops = [draws[row].sampling.logprobs or 0 for row in scored]
    scores = _score(logits, tokens, scored, num_top=max(num_tops, default=0))
    # Token ids are exact in float64.
    packed = torch.cat([tokens.double(), is_sound.double(), scores.flatten()]).tolist()
    token_ids = [int(token) for token in packed[: len(draws)]]
    _require_sound(packed[len(draws) : 2 * len(draws)])
    flat, width = packed[2 * len(draws) :], scores.shape[1]
    table = [flat[start : start + width] for start in range(0, len(flat), width)]
    logprobs = read_scores([token_ids[row] for row in scored], table, num_tops)
    by_row = dict(zip(scored, logprobs, strict=True))
    return [Sampled(token_id, by_row.get(row)) for row, token_id in enumerate(token_ids)]


def _wilful(draws: Sequence[Draw], eos_token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows that may get another token than their likeliest: greedy ones, and random ones."""
    random = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    greedy = [
        row
        for row, draw in enumerate(draws)
        if draw.sampling.temperature <= 0 and changes_logits(draw, eos_token_ids)
    ]
    return greedy, random


def _choose(
    logits: torch.Tensor, draws: Sequence[Draw], eos_token_ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of copied float32 logits, of greedy rows or of random ones, and whether each row had
    a finite logit left to choose. The logits are used up.
    """
    change_logits(logits, draws, eos_token_ids=eos_token_ids)
    tokens = logits.argmax(dim=-1)
    is_sound = logits.gather(1, tokens[:, None])[:, 0].isfinite()
    if draws[0].sampling.temperature > 0:
        tokens = choose(logits, draws, uniforms(draws))
    return tokens, is_sound


def _score(
    logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[int], *, num_top: int
) -> torch.Tensor:
    num_top = min(num_top, logits.shape[1])
    found = [logits.new_empty((0, 1 + 2 * num_top), dtype=torch.float64)]
    for some in _chunks(rows, logits.shape[1]):
        at = torch.tensor(some, device=logits.device)
        found.append(score(logits[at].float(), tokens[at], num_top=num_top))
    return torch.cat(found)


def _chunks(rows: Sequence[int], vocab_size: int) -> Iterator[Sequence[int]]:
    size = max(1, SAMPLING_BYTES // (_BYTES_PER_LOGIT * vocab_size))
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _require_sound(flags: Sequence[float]) -> None:
    num_bad = flags.count(0.0)
    if num_bad:
        raise ValueError(f"{num_bad} of {len(flags)} rows have no finite logit")
