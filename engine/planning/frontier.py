"""Throughput against completion latency: the best plan of each block size, those dominated left out."""

import dataclasses
from typing import Final

from engine.config import Budgets
from engine.errors import BudgetError
from engine.planning.plan import Plan, make_plan
from engine.planning.planners.base import Wishes
from engine.planning.shape import ModelShape

_ROWS: Final = tuple(2**power for power in range(14))


def frontier(shape: ModelShape, budgets: Budgets, wishes: Wishes) -> list[Plan]:
    """By rising latency, and so by rising tokens a second; empty if not one row fits."""
    plans = []
    for rows in _ROWS:
        try:
            plans.append(make_plan(shape, budgets, dataclasses.replace(wishes, block_rows=rows)))
        except BudgetError:
            break  # nor will more rows
    best: list[Plan] = []
    for plan in sorted(plans, key=lambda each: each.prediction.latency_s):
        if not best or plan.prediction.tokens_per_s > best[-1].prediction.tokens_per_s:
            best.append(plan)
    return best
