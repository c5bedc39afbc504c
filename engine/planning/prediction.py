"""What a policy is predicted to achieve, term by term; computes nothing but sums of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Final

from engine.planning.policy import Tier


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SweepTerms:
    """Seconds that one steady sweep keeps each link and unit busy; 0 for what is not used."""

    disk_read_s: float = 0.0
    """Weights that are read from disk."""
    kv_disk_s: float = 0.0
    """Cached keys and values that are read from disk."""
    bus_s: float = 0.0
    """Weights from host memory to the GPU."""
    kv_transfer_s: float = 0.0
    """What else comes to a GPU: cached keys and values, hidden states, answers of attention."""
    gemm_s: float = 0.0
    head_s: float = 0.0
    elementwise_s: float = 0.0
    """What lies between products: norms, rotations, gates, sums."""
    attention_s: float = 0.0
    """On the compute tier."""
    beside_s: float = 0.0
    """Attention on the CPU beside keys and values that live there, with a GPU as compute tier."""
    expand_s: float = 0.0
    """Stored weights turned to compute dtype."""
    store_s: float = 0.0
    """New keys and values, and hidden states, sent to where they live."""
    overhead_s: float = 0.0
    """What layers, rows and the sweep cost beside arithmetic."""
    bubble_s: float = 0.0
    """What cannot hide behind anything: added to the slowest lane."""

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


LANES: Final[Mapping[str, tuple[str, ...]]] = {
    "disk": ("disk_read_s", "kv_disk_s"),
    "bus": ("bus_s", "kv_transfer_s"),
    "store": ("store_s",),
    "compute": ("gemm_s", "head_s", "elementwise_s", "attention_s", "expand_s", "overhead_s"),
    "attention beside": ("beside_s",),
}
"""Which terms follow one another; lanes go on beside each other where the policy overlaps."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """`sweep_s` is one steady sweep, in which `sweep_tokens` tokens are generated, while
    `num_rows` rows are running and `prompt_tokens` of prompts are computed beside them.

    `tokens_per_s` is of the steady state, `job_tokens_per_s` of the whole finite job of `job_s`:
    `startup_s` of it pass before the block is full, `tail_s` after no row is left to fill it.
    All tokens/s count generated tokens.
    """

    terms: SweepTerms
    overlap: bool
    sweep_s: float
    sweep_tokens: float
    prompt_tokens: float
    num_rows: float
    tokens_per_s: float
    job_s: float
    job_tokens_per_s: float
    startup_s: float
    tail_s: float
    latency_s: float
    """Of one row, from when it enters the block to its last token, in steady state."""
    binding_lane: str
    """The slowest of LANES."""
    binding_term: str
    """The largest term of that lane."""
    peak_bytes: Mapping[Tier, int]

    @property
    def lanes_s(self) -> dict[str, float]:
        """Seconds of each lane in one sweep."""
        terms = self.terms.as_dict()
        return {lane: sum(terms[name] for name in names) for lane, names in LANES.items()}
