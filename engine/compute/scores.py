"""How likely given tokens are, while the vocabulary passes by tile by tile; all of their logits are
never there at once. Knows no prompts and no weights.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from engine.compute.logprobs import ids_of, keys_of, logits_of
from engine.planning.cost import SAMPLING_BYTES

TILE_TOKENS: Final = 1024
"""Of the vocabulary that are looked at together."""

_BYTES_PER_LOGIT: Final = 40
"""Of a tile at worst: its float32, what the model makes of it, its exponentials, or its keys."""

ROWS_AT_ONCE: Final = SAMPLING_BYTES // (_BYTES_PER_LOGIT * TILE_TOKENS)


class RunningScores:
    """Of the rows of `hidden` (rows, hidden), each with its own of `token_ids`, and of the `num_top`
    likeliest tokens in its place, no more than the vocabulary has.

    Kept of each row: its largest logit so far, the sum of exponentials below that, its token's logit,
    and the keys of the likeliest tokens.
    """

    def __init__(self, hidden: torch.Tensor, token_ids: Sequence[int], *, num_top: int) -> None:
        device, num_rows = hidden.device, len(hidden)
        assert num_rows == len(token_ids), "each row has a token of its own"
        self.hidden = hidden
        self._num_top = num_top
        self._token_ids = torch.tensor(token_ids, dtype=torch.long, device=device)
        lowest = torch.finfo(torch.float32).min
        self._best = torch.full((num_rows,), lowest, dtype=torch.float32, device=device)
        self._total = torch.zeros(num_rows, dtype=torch.float64, device=device)
        self._own = torch.zeros(num_rows, dtype=torch.float32, device=device)
        least = torch.iinfo(torch.int64).min
        self._keys = torch.full((num_rows, num_top), least, dtype=torch.int64, device=device)

    def chunks(self) -> Iterator[slice]:
        """Rows that are looked at together."""
        for first in range(0, len(self.hidden), ROWS_AT_ONCE):
            yield slice(first, first + ROWS_AT_ONCE)

    def add(self, rows: slice, logits: torch.Tensor, *, first_id: int) -> None:
        """Float32 (rows, tokens) logits of the tokens from `first_id` on. Each token comes once."""
        before = self._best[rows]
        best = torch.maximum(before, logits.amax(dim=-1))
        lost = (before - best).double().exp_()
        masses = (logits - best[:, None]).exp_()
        self._total[rows] = self._total[rows] * lost + masses.sum(dim=-1, dtype=torch.float64)
        self._best[rows] = best
        del masses  # its room is wanted for the keys
        places = self._token_ids[rows] - first_id
        is_here = (places >= 0) & (places < logits.shape[1])
        found = logits.gather(1, places.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self._own[rows] = torch.where(is_here, found, self._own[rows])
        if self._num_top:
            keys = keys_of(logits, first_id=first_id)
            likeliest = keys.topk(min(self._num_top, keys.shape[1]), dim=-1).values
            both = torch.cat([self._keys[rows], likeliest], dim=1)
            self._keys[rows] = both.topk(self._num_top, dim=-1).values

    def table(self) -> torch.Tensor:
        """What `logprobs.score` gives of all logits at once: float64 (rows, 1 + 2 * num_top)."""
        norm = (self._best.double() + self._total.log())[:, None]
        own = self._own.double()[:, None] - norm
        top = logits_of(self._keys).double() - norm
        return torch.cat([own, ids_of(self._keys).double(), top], dim=1)
