"""Logits changed by what a row has said and by what its settings ask; chooses no token.

In the order of vLLM: what the row's grammar forbids, stops held back until `min_tokens`, logit bias,
repetition penalty over prompt and generated tokens, then frequency and presence penalty over
generated tokens.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.compute.draws import Draw
from engine.compute.masks import forbid

Cells = tuple[torch.Tensor, torch.Tensor]
"""Rows and columns of logits, each pair once."""


def changes_logits(draw: Draw, eos_token_ids: Sequence[int]) -> bool:
    sampling = draw.sampling
    return bool(
        draw.matcher is not None
        or sampling.logit_bias
        or sampling.repetition_penalty != 1
        or (draw.generated and _penalises_counts(draw))
        or _held_back(draw, eos_token_ids)
    )


def change_logits(
    logits: torch.Tensor, draws: Sequence[Draw], *, eos_token_ids: Sequence[int]
) -> None:
    """Change float32 (rows, vocabulary) logits in place, a draw for each row."""
    forbid(logits, draws)
    _hold_back(logits, [_held_back(draw, eos_token_ids) for draw in draws])
    _add_bias(logits, [dict(draw.sampling.logit_bias) for draw in draws])
    _penalise_repetition(logits, draws)
    _penalise_counts(logits, draws)


def _held_back(draw: Draw, eos_token_ids: Sequence[int]) -> frozenset[int]:
    if draw.position >= draw.sampling.min_tokens:
        return frozenset()
    return draw.sampling.end_token_ids(eos_token_ids)


def _penalises_counts(draw: Draw) -> bool:
    return draw.sampling.frequency_penalty != 0 or draw.sampling.presence_penalty != 0


def _hold_back(logits: torch.Tensor, held_back: Sequence[frozenset[int]]) -> None:
    columns = {row: np.array(list(ids), np.int64) for row, ids in enumerate(held_back) if ids}
    if columns:
        logits[_cells(columns, logits.device)] = float("-inf")


def _add_bias(logits: torch.Tensor, biases: Sequence[Mapping[int, float]]) -> None:
    columns = {row: np.array(list(bias), np.int64) for row, bias in enumerate(biases) if bias}
    if columns:
        values = [value for bias in biases for value in bias.values()]
        logits[_cells(columns, logits.device)] += logits.new_tensor(values)


def _penalise_repetition(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Divide a positive logit by the penalty, multiply another with it: once for each token seen."""
    columns = {
        row: np.unique(np.array([*draw.prompt, *draw.generated], np.int64))
        for row, draw in enumerate(draws)
        if draw.sampling.repetition_penalty != 1
    }
    if columns:
        rows, tokens = _cells(columns, logits.device)
        penalties = logits.new_tensor([draw.sampling.repetition_penalty for draw in draws])[rows]
        before = logits[rows, tokens]
        after = torch.where(before > 0, before / penalties, before * penalties)
        logits[rows, tokens] = after


def _penalise_counts(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Subtract `frequency_penalty` for each time a token came, and `presence_penalty` once."""
    columns, amounts = {}, []
    for row, draw in enumerate(draws):
        if draw.generated and _penalises_counts(draw):
            generated = np.array(draw.generated, np.int64)
            columns[row], counts = np.unique(generated, return_counts=True)
            sampling = draw.sampling
            amounts.append(sampling.frequency_penalty * counts + sampling.presence_penalty)
    if columns:
        subtracted = torch.from_numpy(np.concatenate(amounts)).to(logits)
        logits[_cells(columns, logits.device)] -= subtracted


def _cells(columns: Mapping[int, npt.NDArray[np.int64]], device: torch.device) -> Cells:
    """Where the columns of each row lie: one copy to the device."""
    sizes = [len(each) for each in columns.values()]
    cells = np.stack([np.repeat(list(columns), sizes), np.concatenate([*columns.values()])])
    rows, tokens = torch.from_numpy(cells).to(device)
    return rows, tokens
