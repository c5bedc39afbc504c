"""Logits of tokens that a row's grammar forbids, taken away; knows no grammar's inside."""

from collections.abc import Sequence

import numpy as np
import torch

from engine.compute.draws import Draw
from engine.grammar import WORD_BITS


def forbid(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Make -inf of all that may not come next in float32 (rows, vocabulary) logits, in place.

    A bit for each token goes to the device, 32 to a word, and is taken apart there.
    """
    bound = [(row, draw) for row, draw in enumerate(draws) if draw.matcher is not None]
    if not bound:
        return
    vocab_size = logits.shape[1]
    words = np.zeros((len(bound), -(-vocab_size // WORD_BITS)), np.int32)
    for mask, (_, draw) in zip(words, bound, strict=True):
        assert draw.matcher is not None
        draw.matcher.follow(draw.generated)
        draw.matcher.fill(mask)
    at = torch.tensor([row for row, _ in bound], device=logits.device)
    packed = torch.from_numpy(words).to(logits.device)
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=logits.device)
    allowed = (packed[:, :, None] >> shifts).bitwise_and_(1).bool().flatten(1)[:, :vocab_size]
    logits[at] = logits[at].masked_fill_(~allowed, float("-inf"))
