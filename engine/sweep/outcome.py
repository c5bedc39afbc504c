"""A prediction beside what was measured, term by term; what a run can teach, and when it can."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from engine.planning.corrections import ATTENTION, BETWEEN, BUS, COMPUTE, DISK, PRODUCTS
from engine.planning.policy import Policy, Tier
from engine.planning.prediction import Prediction, SweepTerms
from engine.sweep.report import Report
from engine.timeline import Total, Track

_LEAST_SWEEPS: Final = 16
_MOST_OFF: Final = 1.5
"""Between the tokens of a mean sweep and those of a steady one: others teach nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Seconds of one sweep by term, as predicted for as many tokens as there were, and as measured.

    `is_steady`: the sweeps were enough, and like enough to the predicted one, to learn from.
    """

    predicted_s: Mapping[str, float]
    measured_s: Mapping[str, float]
    predicted_sweep_s: float
    measured_sweep_s: float
    predicted_tokens_per_s: float
    measured_tokens_per_s: float
    is_steady: bool

    def as_dict(self) -> dict[str, Any]:
        """Of plain JSON values."""
        return {
            "terms": {
                name: {
                    "predicted_s": round(self.predicted_s[name], 6),
                    "measured_s": round(self.measured_s[name], 6),
                }
                for name in self.predicted_s
            },
            "sweep": {
                "predicted_s": round(self.predicted_sweep_s, 6),
                "measured_s": round(self.measured_sweep_s, 6),
            },
            "tokens_per_s": {
                "predicted": round(self.predicted_tokens_per_s, 3),
                "measured": round(self.measured_tokens_per_s, 3),
            },
            "is_steady": self.is_steady,
        }


def outcome_of(prediction: Prediction, policy: Policy, report: Report) -> Outcome | None:
    """Of the sweeps that `report` is about; None if there were none."""
    if not report.num_sweeps:
        return None
    tokens = (report.prompt_tokens + report.generated_tokens) / report.num_sweeps
    steady_tokens = prediction.sweep_tokens + prediction.prompt_tokens
    carried = tokens / steady_tokens
    on_gpu = policy.compute is Tier.GPU
    tells_attention = report.totals.get(Track.ATTENTION, Total()).num_spans > 0
    terms = prediction.terms
    return Outcome(
        predicted_s=_predicted(terms, carried, on_gpu=on_gpu, tells_attention=tells_attention),
        measured_s=_measured(report, on_gpu=on_gpu),
        predicted_sweep_s=prediction.sweep_s,
        measured_sweep_s=report.sweep_s / report.num_sweeps,
        predicted_tokens_per_s=prediction.tokens_per_s,
        measured_tokens_per_s=report.generated_tokens / (report.sweep_s or 1),
        is_steady=report.num_sweeps >= _LEAST_SWEEPS and 1 / _MOST_OFF <= carried <= _MOST_OFF,
    )


def _predicted(
    terms: SweepTerms, carried: float, *, on_gpu: bool, tells_attention: bool
) -> dict[str, float]:
    """Weights move whatever a sweep carries; all else goes with its tokens. On a GPU attention is
    part of what its layers take, and nothing else is told apart in them.
    """
    attention = terms.beside_s + (terms.attention_s if tells_attention else 0.0)
    products = terms.gemm_s + terms.head_s + terms.expand_s
    between = terms.elementwise_s + terms.overhead_s
    told = {
        DISK: terms.disk_read_s,
        BUS: terms.bus_s + terms.kv_transfer_s,
        ATTENTION: attention * carried,
    }
    if not on_gpu:
        return told | {PRODUCTS: products * carried, BETWEEN: between * carried}
    attended = 0.0 if tells_attention else terms.attention_s
    return told | {COMPUTE: (products + between + attended) * carried}


def _measured(report: Report, *, on_gpu: bool) -> dict[str, float]:
    covered = {
        track: report.totals.get(track, Total()).covered_s / report.num_sweeps for track in Track
    }
    told = {
        DISK: covered[Track.DISK_READ],
        BUS: covered[Track.TO_GPU],
        ATTENTION: covered[Track.ATTENTION],
    }
    compute_s = (report.sweep_s - report.weights_waited_s) / report.num_sweeps
    if on_gpu:
        return told | {COMPUTE: max(0.0, compute_s)}
    products_s = report.products_s / report.num_sweeps
    between_s = compute_s - covered[Track.ATTENTION] - products_s
    return told | {PRODUCTS: products_s, BETWEEN: max(0.0, between_s)}
