"""A policy with its prediction and what more of each resource would buy; places nothing itself."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

from engine.config import Budgets
from engine.errors import BudgetError
from engine.planning.hardware import Hardware, RateCurve
from engine.planning.planners.base import Situation, Wishes
from engine.planning.planners.milp import plan_milp
from engine.planning.policy import Policy
from engine.planning.predict import predict
from engine.planning.prediction import Prediction
from engine.planning.roofline import Model
from engine.planning.shape import ModelShape

_MORE_BYTES: Final = 10**9
_FASTER: Final = 1.1
_MORE_ROWS: Final = 1.1
"""Of the plan's: what more memory would be used for, if not for weights."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What `change` of `resource` would buy; `gain` 0.02 is two percent more tokens a second."""

    resource: str
    change: str
    gain: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The decision, what it will achieve, and what would help; largest gain first."""

    policy: Policy
    prediction: Prediction
    sensitivities: tuple[Sensitivity, ...] = ()


def make_plan(
    shape: ModelShape, budgets: Budgets, wishes: Wishes, *, with_sensitivities: bool = False
) -> Plan:
    """Wishes need a situation. Raises BudgetError, HardwareError."""
    policy = plan_milp(shape, budgets, wishes)
    situation = wishes.situation
    assert situation is not None, "without one there is no plan"
    prediction = _prediction(shape, policy, situation)
    found: tuple[Sensitivity, ...] = ()
    if with_sensitivities:
        found = _sensitivities(
            shape, budgets, situation, Plan(policy=policy, prediction=prediction)
        )
    return Plan(policy=policy, prediction=prediction, sensitivities=found)


def _prediction(shape: ModelShape, policy: Policy, situation: Situation) -> Prediction:
    model = Model(shape=shape, work=situation.work, hardware=situation.hardware)
    return predict(model, policy, situation.workload)


def _sensitivities(
    shape: ModelShape, budgets: Budgets, situation: Situation, plan: Plan
) -> tuple[Sensitivity, ...]:
    """By differences: planned again with more of one thing, for the same rows and some more."""
    found = []
    for resource, change, more, its in _changes(budgets, situation):
        rates = [plan.prediction.tokens_per_s]
        for rows in {plan.policy.block_rows, round(plan.policy.block_rows * _MORE_ROWS)}:
            rates += _rate(shape, more, Wishes(block_rows=rows, situation=its))
        gain = max(rates) / plan.prediction.tokens_per_s - 1
        found.append(Sensitivity(resource=resource, change=change, gain=gain))
    return tuple(sorted(found, key=lambda each: -each.gain))


def _rate(shape: ModelShape, budgets: Budgets, wishes: Wishes) -> list[float]:
    try:
        return [make_plan(shape, budgets, wishes).prediction.tokens_per_s]
    except BudgetError:
        return []  # more rows than even more memory holds


def _changes(
    budgets: Budgets, situation: Situation
) -> Iterator[tuple[str, str, Budgets, Situation]]:
    sizes = {"GPU memory": "gpu_bytes", "host memory": "host_bytes", "disk": "disk_bytes"}
    for resource, field in sizes.items():
        had = getattr(budgets, field)
        if had:
            more = dataclasses.replace(budgets, **{field: had + _MORE_BYTES})
            yield resource, "1 GB more", more, situation
    for resource, fields in _RATES.items():
        hardware = _faster(situation.hardware, fields)
        if hardware != situation.hardware:
            its = dataclasses.replace(situation, hardware=hardware)
            yield resource, "10% faster", budgets, its


_RATES: Final = {
    "disk reads": ("disk_read",),
    "the link to the GPU": ("to_gpu_pinned_bytes_per_s", "to_gpu_plain_bytes_per_s"),
    "products": ("gemm",),
    "attention": ("attention_bytes_per_s", "prompt_flops_per_s"),
    "expansion of stored weights": ("expand_bytes_per_s",),
    "work between products": ("elementwise_bytes_per_s",),
}


def _faster(hardware: Hardware, fields: tuple[str, ...]) -> Hardware:
    values = {name: _scaled(getattr(hardware, name)) for name in fields}
    return dataclasses.replace(hardware, **values)


def _scaled(rate: Any) -> Any:
    if isinstance(rate, RateCurve):
        return rate.scaled(_FASTER)
    if isinstance(rate, float):
        return rate * _FASTER
    if isinstance(rate, dict):
        return {name: _scaled(each) for name, each in rate.items()}
    return rate
