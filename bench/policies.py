"""The policy that a benchmark runs a job by: the worker's planner's, by a machine's profile, or one of
fixed rules. Knows no process and no engine.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bench.workloads import Request, workload_of
from engine.config import Budgets
from engine.foresight import foresee
from engine.planning.cost import with_spare_kv
from engine.planning.planners import PLANNERS
from engine.planning.planners.base import Situation, Wishes
from engine.planning.policy import Policy
from engine.planning.shape import ModelShape
from engine.profiling.saved import read_hardware


def situation_of(
    checkpoint: Path,
    requests: Sequence[Request],
    profile: Path,
    *,
    on_gpu: bool,
    compute_dtype: str | None = None,
) -> Situation:
    """The machine of the `profile` and the job as it is. Raises what reading either does."""
    return Situation(
        hardware=read_hardware(profile),
        work=foresee(checkpoint, on_gpu=on_gpu, compute_dtype=compute_dtype).work,
        workload=workload_of(requests),
    )


def planned(
    shape: ModelShape, budgets: Budgets, wishes: Wishes, requests: Sequence[Request]
) -> Policy:
    """For the job; without a situation by fixed rules. Raises BudgetError."""
    if wishes.situation is not None:
        return with_spare_kv(shape, PLANNERS["milp"](shape, budgets, wishes), budgets)
    # Rules keep room for rows as long as the model's context: tell them the longest to come.
    longest = max(len(each.token_ids) + each.max_tokens for each in requests)
    told = dataclasses.replace(shape, max_context_tokens=min(shape.max_context_tokens, longest))
    return PLANNERS["fixed"](told, budgets, wishes)
