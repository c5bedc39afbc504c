"""The planner that decides by measured rates: enumerates blocks, places each by a mixed-integer
program, and takes the one that is predicted to generate the most tokens a second.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from typing import Final

from engine.config import Budgets
from engine.errors import BudgetError, HardwareError
from engine.planning.cost import check_budgets, peak_bytes
from engine.planning.load import kept_tokens
from engine.planning.planners.base import Situation, Wishes
from engine.planning.planners.candidates import (
    Away,
    Candidate,
    Loads,
    candidates,
    fetched_otherwise,
    smallest,
    with_larger_chunks,
)
from engine.planning.planners.program import Program
from engine.planning.policy import Policy, Split, Tier
from engine.planning.predict import predict, running_rows, steady
from engine.planning.prediction import Prediction
from engine.planning.roofline import Model
from engine.planning.shape import ModelShape
from engine.planning.sweep import Sweep

_AS_FAST: Final = 0.99
"""Of jobs that are predicted to be so alike, which no prediction tells apart, one is chosen whose keys and
values all lie on the tier that computes, and of those the one that streams the least: it asks the
least of a disk that others may use, too.
"""

_AS_GOOD: Final = 0.8
"""Candidates whose bound is below this share of the best job found are not placed. The bound is of the
steady state, which a short job's own rate may differ from in either direction.
"""

_STEADY_AS_GOOD: Final = 0.9
"""Jobs are not played through of policies whose own steady state is below this share of that job."""

_PLAYED_AS_GOOD: Final = 0.95
"""Nor of those whose mean sweep is: with more rows fewer micro-batches may hold all, so that it is no bound to
the last percent.
"""


def plan_milp(shape: ModelShape, budgets: Budgets, wishes: Wishes) -> Policy:
    """Raises BudgetError with the tier, what it lacks and the smallest change that would fit, and
    HardwareError where the situation has no rate that is needed.
    """
    if wishes.situation is None:
        raise HardwareError("a plan by measured rates needs the machine's and what waits for it")
    situation = wishes.situation
    model = Model(shape=shape, work=situation.work, hardware=situation.hardware)
    found = _placed(model, budgets, wishes, situation)
    if not found:
        raise BudgetError(_what_lacks(model, budgets, wishes))
    fastest = max(prediction.job_tokens_per_s for prediction, _ in found)
    prediction, policy = min(
        (pair for pair in found if pair[0].job_tokens_per_s >= _AS_FAST * fastest),
        key=lambda pair: (
            _away(pair[1]) > 0,
            pair[1].streamed_bytes,
            _away(pair[1]),
            -pair[0].job_tokens_per_s,
        ),
    )
    return dataclasses.replace(policy, reason=reason(policy, prediction))


def _placed(
    model: Model, budgets: Budgets, wishes: Wishes, situation: Situation
) -> list[tuple[Prediction, Policy]]:
    """All candidates that what they must compute leaves a chance, placed, and the whole job of those
    that their steady state leaves one; of the best block those with larger chunks, too.
    """
    search = _Search(model, budgets, situation)
    search.look_at_all(candidates(model.shape, budgets, wishes))
    if search.found:
        rows = max(search.found, key=lambda each: each[0].job_tokens_per_s)[1].block_rows
        larger = with_larger_chunks(model.shape, budgets, wishes, block_rows=rows)
        search.look_at_all(larger)
    for each in smallest(model.shape, budgets, wishes) if not search.found else ():
        search.look_at(each)
    return search.found


class _Search:
    """The jobs that were predicted so far, and what of the next one need not be looked at.

    A job has to reach its steady state and to leave it, so the rates of both are close and not equal.
    """

    def __init__(self, model: Model, budgets: Budgets, situation: Situation) -> None:
        self._model = model
        self._budgets = budgets
        self._workload = situation.workload
        self._program = Program(model, budgets)
        self._loads = Loads(situation)
        self._settled: set[Policy] = set()
        self.found: list[tuple[Prediction, Policy]] = []

    @property
    def _best_rate(self) -> float:
        return max((each.job_tokens_per_s for each, _ in self.found), default=0.0)

    @property
    def least_rate(self) -> float:
        """Tokens/s of a steady state that leaves a job the chance to be the fastest."""
        return _AS_GOOD * self._best_rate

    @property
    def least_steady(self) -> float:
        """The same of a policy that was placed for its own steady state."""
        return _STEADY_AS_GOOD * self._best_rate

    def look_at_all(self, candidates: Iterable[Candidate]) -> None:
        """The most promising first, for each of the sweeps that it is to be placed for."""
        shape = self._model.shape
        bounded = sorted(
            (-each.load.rows / self._program.least_seconds(each), at, each)
            for at, each in enumerate(candidates)
            if _can_fit(shape, each, self._budgets)
        )
        for bound, _, each in bounded:
            if -bound <= self.least_rate:
                break
            for placed_for in self._loads.of(each):
                is_steady = placed_for.load == each.load
                self.look_at(placed_for, least=self.least_steady if is_steady else self.least_rate)

    def look_at(self, whole: Candidate, *, least: float = 0.0) -> None:
        """With layers that come whole and, unless none streams then, with such as come otherwise. Where
        several micro-batches hold all of a layer that is worth next to nothing if two of them fit.
        Neither where a sweep of its load cannot reach `least` tokens/s.
        """
        at_most_s = whole.load.rows / least if least else math.inf
        policy = self._program.place(whole, at_most_s=at_most_s)
        if policy is not None:
            at_most_s = min(at_most_s, self._settle(policy))
        holds = whole.base.may_cut_sweeps or whole.away is Away.FETCHED
        if policy is not None and (holds or not policy.streamed_bytes):
            return
        otherwise = fetched_otherwise(self._model.shape, whole)
        if otherwise is None:
            return
        other = self._program.place(otherwise, at_most_s=at_most_s)
        if other is not None:
            self._settle(other)

    def _settle(self, policy: Policy) -> float:
        """Predict the policy's job and, where keys and values are few enough, that of it with all of
        them on its own tier. Seconds of a steady sweep.
        """
        load, _, sweep_s = steady(self._model, policy, self._workload)
        if load.rows / sweep_s <= self.least_steady:
            return sweep_s
        if policy in self._settled:
            # Placed alike for another sweep.
            return sweep_s
        self._settled.add(policy)
        if self._most_rate(policy) <= _PLAYED_AS_GOOD * self._best_rate:
            return sweep_s
        self.found.append((predict(self._model, policy, self._workload), policy))
        if _away(policy):
            near = dataclasses.replace(policy, kv=Split.on(policy.compute, policy.kv.total_bytes))
            with contextlib.suppress(BudgetError):
                check_budgets(self._model.shape, near, self._budgets)
                self.found.append((predict(self._model, near, self._workload), near))
        return sweep_s

    def _most_rate(self, policy: Policy) -> float:
        """Tokens/s of a short job at most: what a sweep takes rises ever faster with what it carries, so
        all sweeps take at least as many times what the mean one does. Of a long job nobody knows.
        """
        load = self._loads.mean(policy)
        if load is None:
            return math.inf
        rows = running_rows(self._model, policy, self._workload)
        kept = max(1.0, load.rows) * kept_tokens(self._workload, rows=rows) / rows
        return load.rows / Sweep(self._model, policy).seconds(load, kept_tokens=kept)


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
    """Of the plan that lacks the least, the tier that lacks the most."""
    shape = model.shape
    limits = {
        Tier.GPU: budgets.gpu_bytes,
        Tier.CPU: budgets.host_bytes,
        Tier.DISK: budgets.disk_bytes,
    }

    def lacking(least: Candidate) -> tuple[int, Tier]:
        base = least.base
        kv = Split.on(base.compute, least.kept_tokens * shape.kv_bytes_per_token)
        peaks = peak_bytes(shape, dataclasses.replace(_all_streamed(shape, base), kv=kv))
        tier = max(Tier, key=lambda each: peaks[each] - limits[each])
        return peaks[tier] - limits[tier], tier

    least = min(smallest(shape, budgets, wishes), key=lambda each: lacking(each)[0])
    missing, tier = lacking(least)
    if missing <= 0:
        tier, missing = least.base.compute, max(1, *shape.layer_bytes)
    return (
        f"the {tier} tier needs {limits[tier] + missing:,} bytes under the smallest plan and its "
        f"budget is {limits[tier]:,} bytes: {missing:,} bytes more would do for "
        f"{least.base.block_rows} rows, {least.kept_tokens:,} cached tokens and all weights "
        f"streamed, or shorter rows"
    )


def reason(policy: Policy, prediction: Prediction) -> str:
    """What was decided and what binds it, for people."""
    lanes = prediction.lanes_s
    slowest = lanes[prediction.binding_lane]
    term = prediction.binding_term.removesuffix("_s").replace("_", " ")
    where = "all weights are resident"
    if policy.streamed_bytes:
        where = f"{policy.streamed_bytes:,} bytes of weights are streamed each sweep"
        where += f" in units of {policy.unit_bytes:,}" if policy.unit_bytes else ""
    return (
        f"{prediction.tokens_per_s:.3g} tokens/s predicted: {where} for {policy.block_rows} rows; "
        f"{prediction.binding_lane} binds with {slowest:.3g} of {prediction.sweep_s:.3g} s a sweep, "
        f"most of it {term}"
    )
