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
    # By bytes, the lowest first as on every machine here: words would be four times as much to move.
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    bits = (packed.view(torch.uint8)[:, :, None] >> shifts).bitwise_and_(1)
    forbidden = bits.flatten(1)[:, :vocab_size] == 0
    logits[at] = logits[at].masked_fill_(forbidden, float("-inf"))
