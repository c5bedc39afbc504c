"""What every planner is: shape and budgets in, a policy that fits them out."""

import dataclasses
from typing import Protocol

from engine.config import Budgets
from engine.planning.flops import Work
from engine.planning.hardware import Hardware
from engine.planning.policy import Policy
from engine.planning.shape import ModelShape
from engine.planning.workload import Workload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a decision hangs on beside bytes: the machine's rates, a token's work, what waits."""

    hardware: Hardware
    work: Work
    workload: Workload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a person insists on; None leaves it to the planner. Without a `situation` only planners
    that go by fixed rules can decide.
    """

    block_rows: int | None = None
    sweep_tokens: int | None = None
    situation: Situation | None = None


class Planner(Protocol):
    def __call__(self, shape: ModelShape, budgets: Budgets, wishes: Wishes) -> Policy:
        """Raises BudgetError with the tier, what it lacks and what it has."""
        ...
