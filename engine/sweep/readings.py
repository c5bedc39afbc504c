"""What is read of prompts' hidden states, sweep by sweep, and what a row's readings come to in the end:
scores of its tokens, or an embedding. Knows no weights and no order.
"""

from collections.abc import Sequence

import torch

from engine.compute.logprobs import read_scores
from engine.compute.scores import RunningScores
from engine.config import Embedding, Scoring, TokenLogprobs
from engine.errors import EngineError
from engine.sweep.rows import Row, Share


class Readings:
    """Those of one sweep. `parts` are the shares of its micro-batches."""

    def __init__(self, parts: Sequence[Sequence[Share]], *, vocab_size: int) -> None:
        read = [[share for share in part if share.read_positions] for part in parts]
        self._scored = [[share for share in part if share.is_scored] for part in read]
        self._pooled = [[share for share in part if not share.is_scored] for part in read]
        self._vocab_size = vocab_size
        self._scores: list[tuple[Sequence[Share], RunningScores]] = []
        self._sums: list[tuple[Sequence[Share], torch.Tensor]] = []

    @property
    def num_scored(self) -> int:
        """Tokens whose logits are looked at."""
        return sum(len(share.read_positions) for part in self._scored for share in part)

    def begin(self, hidden: Sequence[torch.Tensor]) -> list[RunningScores]:
        """Takes the (rows, hidden) of each micro-batch, those to be scored before those to be pooled.
        The scores are to be shown the vocabulary before `by_row`.
        """
        for rows, scored, pooled in zip(hidden, self._scored, self._pooled, strict=True):
            targets = [target for share in scored for target in _targets(share)]
            if scored:
                num_top = min(max(map(_num_top, scored)), self._vocab_size)
                scores = RunningScores(rows[: len(targets)], targets, num_top=num_top)
                self._scores.append((scored, scores))
            if pooled:
                self._sums.append((pooled, _sums(rows[len(targets) :], pooled)))
        return [scores for _, scores in self._scores]

    def by_row(self) -> dict[Row, torch.Tensor]:
        """On the CPU, float64: (tokens, 1 + 2 * num_top) scores as `logprobs.score` gives them, or
        the sum (hidden,) of the states that were read. Raises EngineError if they are not finite.
        """
        found: dict[Row, torch.Tensor] = {}
        for shares, scores in self._scores:
            table, counts = scores.table().cpu(), [len(share.read_positions) for share in shares]
            for share, own in zip(shares, torch.split(table, counts), strict=True):
                found[share.row] = _first_likeliest(own, _num_top(share))
        for shares, sums in self._sums:
            found |= {share.row: own for share, own in zip(shares, sums.cpu(), strict=True)}
        for row, values in found.items():
            told = values[:, 0] if isinstance(row.prompt.reading, Scoring) else values
            if not told.isfinite().all():
                raise EngineError(f"what the model makes of prompt {row.prompt.key} is not finite")
        return found


def prompt_logprobs(row: Row) -> tuple[TokenLogprobs, ...] | None:
    """Of the tokens after the first of a row whose prompt has been computed; None if not asked for."""
    reading = row.prompt.reading
    if not isinstance(reading, Scoring):
        return None
    table = [values for chunk in row.readings for values in chunk.tolist()]
    targets = row.prompt.token_ids[1:]
    return tuple(read_scores(targets, table, [reading.num_top] * len(targets)))


def embedding(row: Row) -> bytes | None:
    """Likewise, of float32. A mean is the sum but for its length, which is made 1 anyway."""
    reading = row.prompt.reading
    if not isinstance(reading, Embedding):
        return None
    vector = torch.stack(row.readings).sum(dim=0)[: reading.dimensions]
    unit = vector / vector.norm().clamp(min=torch.finfo(torch.float64).tiny)
    raw: bytes = unit.numpy().astype("<f4").tobytes()
    return raw


def _targets(share: Share) -> Sequence[int]:
    """The tokens that the states which are read foretell."""
    read = share.read_positions
    return share.row.prompt.token_ids[read.start + 1 : read.stop + 1]


def _num_top(share: Share) -> int:
    reading = share.row.prompt.reading
    return reading.num_top if isinstance(reading, Scoring) else 0


def _first_likeliest(table: torch.Tensor, num_top: int) -> torch.Tensor:
    """Columns of the first `num_top` likeliest tokens, of as many as there are."""
    most = (table.shape[1] - 1) // 2
    kept = min(num_top, most)
    return torch.cat([table[:, : 1 + kept], table[:, 1 + most : 1 + most + kept]], dim=1)


def _sums(hidden: torch.Tensor, shares: Sequence[Share]) -> torch.Tensor:
    """(shares, hidden) in float64 of (rows, hidden)."""
    parts = torch.split(hidden, [len(share.read_positions) for share in shares])
    return torch.stack([rows.sum(dim=0, dtype=torch.float64) for rows in parts])
