"""Exponentials as whole numbers, whose sums depend on no order; knows no rows and no tokens.

A float sum over the vocabulary hangs, in its last bits, on how a device cuts it up, which hangs on
how many rows are summed at once. Whole numbers add up to the same wherever they are.
"""

from typing import Final

import torch

MASS_BITS: Final = 40
"""e**0 weighs 2**40: a vocabulary of 2**22 tokens sums within int64, and what is lighter than
1e-12 of the likeliest token weighs nothing."""


def masses(logits: torch.Tensor) -> torch.Tensor:
    """E to the power of float32 logits not above 0, in units of 2**-40. The logits are used up."""
    return logits.exp_().mul_(2.0**MASS_BITS).to(torch.int64)


def log_total(total: torch.Tensor) -> torch.Tensor:
    """The natural logarithm of a sum of masses, as float64."""
    return total.double().mul_(2.0**-MASS_BITS).log_()
