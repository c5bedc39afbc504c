"""The planner that decides by measured rates: enumerates blocks, places each by a mixed-integer
program, and takes the one that is predicted to generate the most tokens a second.
"""

import contextlib
import dataclasses
import math
from typing import Final

from engine.config import Budgets
from engine.errors import BudgetError, HardwareError
from engine.planning.cost import check_budgets, peak_bytes
from engine.planning.planners.base import Wishes
from engine.planning.planners.candidates import Candidate, candidates, smallest
from engine.planning.planners.program import Program
from engine.planning.policy import Policy, Split, Tier
from engine.planning.predict import predict
from engine.planning.prediction import Prediction
from engine.planning.roofline import Model
from engine.planning.shape import ModelShape
from engine.planning.workload import Workload

_AS_FAST: Final = 0.998
"""Of jobs that are predicted to be so alike the one is chosen that streams the least."""

_AS_GOOD: Final = 0.8
"""Candidates whose bound is below this share of the best job found are not placed. The bound is of the
steady state, which a short job's own rate may differ from in either direction.
"""


def plan_milp(shape: ModelShape, budgets: Budgets, wishes: Wishes) -> Policy:
    """Raises BudgetError with the tier, what it lacks and the smallest change that would fit, and
    HardwareError where the situation has no rate that is needed.
    """
    if wishes.situation is None:
        raise HardwareError("a plan by measured rates needs the machine's and what waits for it")
    situation = wishes.situation
    model = Model(shape=shape, work=situation.work, hardware=situation.hardware)
    found = _placed(model, budgets, wishes, situation.workload)
    if not found:
        raise BudgetError(_what_lacks(model, budgets, wishes))
    fastest = max(prediction.job_tokens_per_s for prediction, _ in found)
    prediction, policy = min(
        (pair for pair in found if pair[0].job_tokens_per_s >= _AS_FAST * fastest),
        key=lambda pair: (pair[1].streamed_bytes, _away(pair[1]), -pair[0].job_tokens_per_s),
    )
    return dataclasses.replace(policy, reason=reason(policy, prediction))


def _placed(
    model: Model, budgets: Budgets, wishes: Wishes, workload: Workload
) -> list[tuple[Prediction, Policy]]:
    """All candidates that what they must compute leaves a chance, placed, and the whole job of each.

    A job has to reach its steady state and to leave it, so the two are close and not equal.
    """
    program = Program(model, budgets)
    bounded = sorted(
        (-each.load.rows / program.least_seconds(each), at, each)
        for at, each in enumerate(candidates(model.shape, budgets, wishes))
        if _can_fit(model.shape, each, budgets)
    )
    found: list[tuple[Prediction, Policy]] = []
    fastest = 0.0
    for bound, _, each in bounded:
        least = _AS_GOOD * fastest
        if -bound <= least:
            break
        policy = program.place(each, at_most_s=each.load.rows / least if least else math.inf)
        if policy is None:
            continue
        found += _settled(model, policy, budgets, workload)
        fastest = max(prediction.job_tokens_per_s for prediction, _ in found)
    if not found and (policy := program.place(smallest(model.shape, budgets, wishes))):
        found.append((predict(model, policy, workload), policy))
    return found


def _settled(
    model: Model, policy: Policy, budgets: Budgets, workload: Workload
) -> list[tuple[Prediction, Policy]]:
    """The policy and, where keys and values are few enough, it with all of them on its own tier."""
    found = [(predict(model, policy, workload), policy)]
    if _away(policy):
        near = dataclasses.replace(policy, kv=Split.on(policy.compute, policy.kv.total_bytes))
        with contextlib.suppress(BudgetError):
            check_budgets(model.shape, near, budgets)
            found.append((predict(model, near, workload), near))
    return found


def _away(policy: Policy) -> int:
    """Bytes for keys and values on other tiers than the one that computes."""
    return policy.kv.total_bytes - policy.kv[policy.compute]


def _can_fit(shape: ModelShape, candidate: Candidate, budgets: Budgets) -> bool:
    """Whether what cannot be placed elsewhere fits the compute tier."""
    base = candidate.base
    away = _all_streamed(shape, base)
    limit = budgets.gpu_bytes if base.compute is Tier.GPU else budgets.host_bytes
    placed = dataclasses.replace(away, layer_splits=base.layer_splits)
    least = peak_bytes(shape, placed)[base.compute] - sum(shape.layer_bytes)
    return least <= limit


def _all_streamed(shape: ModelShape, policy: Policy) -> Policy:
    def disk(num_bytes: int) -> Split:
        return Split.on(Tier.DISK, num_bytes)

    return dataclasses.replace(
        policy,
        layer_splits=tuple(disk(num_bytes) for num_bytes in shape.layer_bytes),
        head_split=disk(shape.head.num_bytes) if shape.head else None,
        embedding_split=disk(shape.embedding.num_bytes) if shape.embedding else None,
    )


def _what_lacks(model: Model, budgets: Budgets, wishes: Wishes) -> str:
    """Of the plan that takes the least, the tier that lacks the most."""
    shape = model.shape
    least = smallest(shape, budgets, wishes)
    kv_bytes = least.kept_tokens * shape.kv_bytes_per_token
    compute = least.base.compute
    limits = {
        Tier.GPU: budgets.gpu_bytes,
        Tier.CPU: budgets.host_bytes,
        Tier.DISK: budgets.disk_bytes,
    }
    streamed = dataclasses.replace(_all_streamed(shape, least.base), kv=Split.on(compute, kv_bytes))
    peaks = peak_bytes(shape, streamed)
    tier = max(Tier, key=lambda each: peaks[each] - limits[each])
    lacking = peaks[tier] - limits[tier]
    if lacking <= 0:
        tier, lacking = compute, max(1, *shape.layer_bytes)
    return (
        f"the {tier} tier needs {limits[tier] + lacking:,} bytes under the smallest plan and its "
        f"budget is {limits[tier]:,} bytes: {lacking:,} bytes more would do for "
        f"{least.base.block_rows} rows, {least.kept_tokens:,} cached tokens and all weights "
        f"streamed, or shorter rows"
    )


def reason(policy: Policy, prediction: Prediction) -> str:
    """What was decided and what binds it, for people."""
    lanes = prediction.lanes_s
    slowest = lanes[prediction.binding_lane]
    term = prediction.binding_term.removesuffix("_s").replace("_", " ")
    where = (
        "all weights are resident"
        if not policy.streamed_bytes
        else f"{policy.streamed_bytes:,} bytes of weights are streamed each sweep"
    )
    return (
        f"{prediction.tokens_per_s:.3g} tokens/s predicted: {where} for {policy.block_rows} rows; "
        f"{prediction.binding_lane} binds with {slowest:.3g} of {prediction.sweep_s:.3g} s a sweep, "
        f"most of it {term}"
    )
