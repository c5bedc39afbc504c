"""What the planner's benchmark makes of its runs: errors, the terms that explain them, tables."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, Final

from bench.planner_cases import Case
from engine.planning.policy import Policy
from engine.sweep.outcome import Outcome

_TITLES: Final = (
    "configuration | rows | streamed MB | measured tok/s (min-max) | predicted | error "
    "| seconds a sweep: predicted/measured by term | largest miss"
)
_GRID_TITLES: Final = (
    "configuration | alternatives | planned tok/s (min-max) | best tok/s | planned over best "
    "| the best's policy"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One run of a whole job under a policy; tokens/s are of generated tokens over the job."""

    case: Case
    policy: Policy
    host_bytes: int
    is_planned: bool
    job_s: float
    predicted_tokens_per_s: float
    measured_tokens_per_s: float
    preempted_rows: int
    outcome: Outcome
    is_final: bool = False
    """Of a grid's fastest and the planned policy, run again in turns."""

    def as_dict(self) -> dict[str, Any]:
        """Of plain JSON values."""
        policy = self.policy
        return {
            "case": self.case.name,
            "is_planned": self.is_planned,
            "is_final": self.is_final,
            "host_bytes": self.host_bytes,
            "block_rows": policy.block_rows,
            "sweep_tokens": policy.sweep_tokens,
            "micro_batch_tokens": policy.micro_batch_tokens,
            "unit_bytes": policy.unit_bytes,
            "num_slots": policy.num_slots,
            "streamed_bytes": policy.streamed_bytes,
            "kv_bytes": policy.kv.total_bytes,
            "reason": policy.reason,
            "job_s": round(self.job_s, 4),
            "job_tokens_per_s": {
                "predicted": round(self.predicted_tokens_per_s, 3),
                "measured": round(self.measured_tokens_per_s, 3),
            },
            "preempted_rows": self.preempted_rows,
            "steady": self.outcome.as_dict(),
        }


def middle(runs: Sequence[Ran]) -> Ran:
    """The run whose rate is the median; of two, the slower."""
    ordered = sorted(runs, key=lambda run: run.measured_tokens_per_s)
    return ordered[(len(ordered) - 1) // 2]


def typical(runs: Sequence[Ran]) -> Ran:
    """The run whose error is the median; of two, the one that is off further."""
    ordered = sorted(runs, key=relative_error)
    middle_two = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return max(middle_two, key=lambda run: abs(relative_error(run)))


def relative_error(run: Ran) -> float:
    """Predicted over measured, less one."""
    return run.predicted_tokens_per_s / run.measured_tokens_per_s - 1


def largest_miss(outcome: Outcome) -> str:
    """The term that is off by the most seconds, with its share of the measured sweep."""
    off = {
        name: outcome.predicted_s[name] - outcome.measured_s[name] for name in outcome.predicted_s
    }
    name = max(off, key=lambda each: abs(off[each]))
    return f"{name} {off[name] / outcome.measured_sweep_s:+.0%} of a sweep"


def table(groups: Sequence[Sequence[Ran]]) -> str:
    """A line for each configuration's repetitions, which are its typical run's but for the range, and
    under it the errors of those and of all runs.
    """
    lines = [
        f"| {_TITLES} |",
        "|" + 8 * "---|",
    ]
    lines += [_line(runs) for runs in groups]
    verdicts = [
        _verdict("configurations", [typical(runs) for runs in groups]),
        _verdict("all runs", [run for runs in groups for run in runs]),
    ]
    return "\n".join([*lines, "", *verdicts])


def _verdict(what: str, runs: Sequence[Ran]) -> str:
    errors = [abs(relative_error(run)) for run in runs]
    return f"error of {what}: median {statistics.median(errors):.1%}, worst {max(errors):.1%}"


def _line(runs: Sequence[Ran]) -> str:
    run = typical(runs)
    rates = [each.measured_tokens_per_s for each in runs]
    outcome = run.outcome
    terms = ", ".join(
        f"{name} {seconds:.3f}/{outcome.measured_s[name]:.3f}"
        for name, seconds in outcome.predicted_s.items()
        if seconds or outcome.measured_s[name]
    )
    cells = [
        run.case.name,
        str(run.policy.block_rows),
        f"{run.policy.streamed_bytes / 1e6:.0f}",
        f"{run.measured_tokens_per_s:.0f} ({min(rates):.0f}-{max(rates):.0f})",
        f"{run.predicted_tokens_per_s:.0f}",
        f"{relative_error(run):+.0%}",
        terms,
        largest_miss(outcome),
    ]
    return f"| {' | '.join(cells)} |"


def grid_table(grids: Sequence[Sequence[Ran]]) -> str:
    """A line for each grid: the planned policy's median over the best alternative's, of the runs in
    turns alone. What made an alternative a finalist may have been luck, and the machine was another
    when the planned one ran between the others.
    """
    lines = [
        f"| {_GRID_TITLES} |",
        "|" + 6 * "---|",
    ]
    return "\n".join([*lines, *map(_grid_line, grids)])


def best_alternatives(runs: Sequence[Ran]) -> list[list[Ran]]:
    """Runs of each alternative, the policy with the fastest median first."""
    by_policy: dict[Policy, list[Ran]] = {}
    for run in runs:
        if not run.is_planned:
            by_policy.setdefault(run.policy, []).append(run)
    return sorted(by_policy.values(), key=lambda its: -middle(its).measured_tokens_per_s)


def _grid_line(runs: Sequence[Ran]) -> str:
    others = best_alternatives(runs)
    finals = [run for run in runs if run.is_final]
    planned = [run.measured_tokens_per_s for run in finals if run.is_planned]
    best = middle(best_alternatives(finals)[0])
    own = statistics.median(planned)
    return (
        f"| {best.case.name} | {len(others)} | {own:.0f} ({min(planned):.0f}-{max(planned):.0f}) "
        f"| {best.measured_tokens_per_s:.0f} | {own / best.measured_tokens_per_s:.0%} "
        f"| {best.policy.reason} |"
    )
