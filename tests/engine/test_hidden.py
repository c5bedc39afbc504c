"""Hidden states that wait elsewhere come back as they were, and so does what lies beside them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from greenlet import greenlet
from torch import nn

from engine.compute.hidden import hidden_on
from engine.compute.lockstep import gate_layers
from engine.planning.policy import Tier

WHOLE = torch.arange(48.0).view(1, 4, 12)
LYING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "alone": lambda whole: whole,
    "before others": lambda whole: whole[:, :2],
    "behind others": lambda whole: whole[:, 2:],
    "between others": lambda whole: whole[..., 3:6],
    "across": lambda whole: whole.transpose(1, 2),
    "everywhere": lambda whole: whole[..., :1].expand(1, 4, 12),
}


@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK])
@pytest.mark.parametrize("lying", list(LYING))
def test_whatever_they_are_part_of(lying: str, tier: Tier, tmp_path: Path) -> None:
    whole = WHOLE.clone()
    states = LYING[lying](whole)
    expected = states.clone()
    layer = nn.Identity()
    gate_layers([layer])
    forward = greenlet(lambda: layer(states))
    forward.hidden = hidden_on(tier, compute=Tier.GPU, spill_dir=tmp_path)
    forward.switch()
    if lying == "alone":
        assert states.untyped_storage().nbytes() == 0
    torch.testing.assert_close(forward.switch(), expected, rtol=0, atol=0)
    torch.testing.assert_close(whole, WHOLE, rtol=0, atol=0)
    forward.hidden.close()
