"""What every planner is: shape and budgets in, a policy that fits them out."""

import dataclasses
from typing import Protocol

from engine.config import Budgets
from engine.planning.policy import Policy
from engine.planning.shape import ModelShape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a person insists on; None leaves it to the planner."""

    block_rows: int | None = None
    sweep_tokens: int | None = None


class Planner(Protocol):
    def __call__(self, shape: ModelShape, budgets: Budgets, wishes: Wishes) -> Policy:
        """Raises BudgetError with the tier, what it lacks and what it has."""
        ...
