"""What the engine achieved so far, counted as it happens; numbers only, no opinion on them."""

import dataclasses
from typing import Any


@dataclasses.dataclass(slots=True, kw_only=True)
class Report:
    """Counters since the engine was loaded. Seconds are wall clock inside sweeps.

    `weights_waited_s` is the part of `sweep_s` in which compute waited for weights;
    `weights_fetched_s` is how long their reading and copying took, beside compute.
    """

    policy_reason: str
    gemm_reason: str = ""
    """Which kernel multiplies, by how many rows there are."""
    num_sweeps: int = 0
    sweep_s: float = 0.0
    sampling_s: float = 0.0
    prompt_tokens: int = 0
    """Prompt tokens computed; those of preempted rows count each time."""
    generated_tokens: int = 0
    completions: int = 0
    peak_rows: int = 0
    preempted_rows: int = 0
    shared_tokens: int = 0
    """Prompt tokens that were not computed: another row had them, or has computed them for all."""
    weights_streamed_bytes: int = 0
    weights_fetched_s: float = 0.0
    weights_waited_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        derived = {
            "generated_tokens_per_s": round(self.generated_tokens / (self.sweep_s or 1), 2),
            "rows_per_sweep": round(self.generated_tokens / (self.num_sweeps or 1), 2),
        }
        plain = dataclasses.asdict(self)
        rounded = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in plain.items()
        }
        return rounded | derived
