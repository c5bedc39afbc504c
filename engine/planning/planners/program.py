"""The mixed-integer linear program of one candidate: where weights, keys and values lie so that the
slowest lane of a sweep is as fast as it can be. Solved by HiGHS; chooses no block, no micro-batch.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from engine.config import Budgets
from engine.planning.cost import KV_PAGE_TOKENS, kv_bytes_within, peak_bytes
from engine.planning.planners.candidates import Away, Candidate
from engine.planning.planners.table import Group, Solution, Table
from engine.planning.policy import Policy, Split, Tier
from engine.planning.roofline import Model
from engine.planning.shape import Placeable, leading_border_bytes, total_bytes
from engine.planning.sweep import Sweep

_MOST_ROUNDS: Final = 6
_RELATIVE_GAP: Final = 1e-4
_ROUNDED_GAP: Final = 2e-3
"""A fifth of what the planner takes to be alike."""

_MOST_NODES: Final = 400
_SPARE_SHARE: Final = 0.25
"""Of the pages that keys and values take in steady state, as many more where they are left over."""


class Program:
    """Of one model within budgets; solved for one candidate after the other."""

    def __init__(self, model: Model, budgets: Budgets) -> None:
        self._model = model
        self._limits = {
            Tier.GPU: budgets.gpu_bytes,
            Tier.CPU: budgets.host_bytes,
            Tier.DISK: budgets.disk_bytes,
        }
        shape = model.shape
        kinds: dict[tuple[Placeable, ...], int] = {}
        for tensors in shape.layers:
            kinds[tensors] = kinds.get(tensors, 0) + 1
        self._layers = [Group("layers", tensors, count) for tensors, count in kinds.items()]
        self._groups = list(self._layers)
        if shape.head is not None:
            self._groups.append(Group("head", shape.head_tensors, 1))
        if shape.embedding is not None:
            self._groups.append(Group("embedding", shape.embedding_tensors, 1))

    @property
    def num_columns(self) -> int:
        return 2 * len(self._groups) + len(Tier) + 2

    def place(self, candidate: Candidate, *, at_most_s: float = math.inf) -> Policy | None:
        """The candidate with everything placed; None where that is not possible, or not without the
        sweep taking more than `at_most_s`, which the program without whole numbers tells quickly.

        The program's rows are linear and its result is put on legal borders, so what it takes is
        checked by `cost.peak_bytes` itself; where that is more than a budget, the program is solved
        again with as much less, and from then on with twice as much more each time. What is missing is
        mostly known from the program without whole numbers already, which is solved first.
        """
        limits = dict(self._limits)
        table = Table(self._model, candidate, groups=self._groups)
        bound = _solve(table, limits, whole=False)
        if bound is None or bound.seconds > at_most_s:
            return None
        for tier, missing in self._over(self._policy(candidate, bound)).items():
            limits[tier] -= max(0, missing)
        for cut in range(_MOST_ROUNDS):
            solution = _in_whole_numbers(table, limits)
            if solution is None:
                return None
            policy = self._policy(candidate, solution)
            over = self._over(policy)
            if max(over.values()) <= 0:
                roomy = self._with_spare_pages(policy, over)
                return roomy if max(self._over(roomy).values()) <= 0 else policy
            for tier, missing in over.items():
                limits[tier] -= max(0, missing) * 2**cut
        return None

    def _over(self, policy: Policy) -> dict[Tier, int]:
        """Bytes by which each tier's peak is over its budget; below 0 what is left."""
        peaks = peak_bytes(self._model.shape, policy)
        return {tier: peaks[tier] - limit for tier, limit in self._limits.items()}

    def _with_spare_pages(self, policy: Policy, over: dict[Tier, int]) -> Policy:
        """Of what is left of a tier that has keys and values, some for them: rows are uneven."""
        shape = self._model.shape
        page_bytes = KV_PAGE_TOKENS * shape.kv_bytes_per_token
        left = {tier: kv_bytes_within(shape, tier, -over[tier]) for tier in Tier}
        spare = {
            tier: min(left[tier], int(policy.kv[tier] * _SPARE_SHARE)) // page_bytes * page_bytes
            for tier in Tier
        }
        return dataclasses.replace(
            policy,
            kv=Split(**{f"{tier}_bytes": policy.kv[tier] + spare[tier] for tier in Tier}),
        )

    def least_seconds(self, candidate: Candidate) -> float:
        """Of a sweep, wherever things lie: what is computed is computed, and what no memory holds
        is read.
        """
        everywhere = candidate.base
        terms = Sweep(self._model, everywhere).busy(candidate.load, kept_tokens=0.0)
        seconds = (
            terms.gemm_s + terms.head_s + terms.elementwise_s + terms.expand_s + terms.overhead_s
        )
        if everywhere.compute is Tier.CPU:
            seconds += terms.attention_s
        return max(seconds, self._least_read_s(candidate))

    def _least_read_s(self, candidate: Candidate) -> float:
        """Weights, or of kept keys and values what is live, at the disk's best rate."""
        shape, work = self._model.shape, self._model.work
        kept_bytes = candidate.kept_tokens * shape.kv_bytes_per_token
        weights = sum(shape.layer_bytes) + total_bytes(shape.head_tensors)
        memory = self._limits[Tier.GPU] + self._limits[Tier.CPU]
        read = 1.0
        if candidate.away is not Away.NONE:
            is_windowed = any(window is not None for window in work.windows)
            live = candidate.load.live_tokens / candidate.kept_tokens
            read = 0.0 if is_windowed else min(1.0, live)
        best_rate = max(rate for _, rate in self._model.hardware.disk_read.points)
        return max(0.0, weights + kept_bytes - memory) * read / best_rate

    def _policy(self, candidate: Candidate, solution: Solution) -> Policy:
        splits = {
            group: _split(group, candidate.base.compute, solution.placed(index))
            for index, group in enumerate(self._groups)
        }
        by_tensors = {group.tensors: splits[group] for group in self._layers}
        by_name = {group.name: split for group, split in splits.items()}
        return dataclasses.replace(
            candidate.base,
            layer_splits=tuple(by_tensors[tensors] for tensors in self._model.shape.layers),
            head_split=by_name.get("head"),
            embedding_split=by_name.get("embedding"),
            kv=solution.kv,
        )


def _in_whole_numbers(table: Table, limits: Mapping[Tier, int]) -> Solution | None:
    """Of the program in parts, rounded, where that loses next to nothing; else in whole numbers, which takes
    some ten times as long.
    """
    roomy = {
        tier: limit - min(max(0, limit), table.rounding_bytes) for tier, limit in limits.items()
    }
    parts = _solve(table, roomy, whole=False)
    if parts is not None:
        rounded = table.rounded(parts, limits)
        if rounded is not None and rounded.seconds <= parts.seconds * (1 + _ROUNDED_GAP):
            return rounded
    return _solve(table, limits)


def _solve(table: Table, limits: Mapping[Tier, int], *, whole: bool = True) -> Solution | None:
    """With tiers that may hold so many bytes; in whole granules and pages, or in parts of them too."""
    found = milp(
        table.objective,
        constraints=LinearConstraint(
            np.array(table.rows), -np.inf, np.array(table.limits(limits), dtype=float)
        ),
        bounds=Bounds(np.zeros(table.width), np.array(table.most, dtype=float)),
        integrality=np.array(table.integral) if whole else None,
        options={"mip_rel_gap": _RELATIVE_GAP, "node_limit": _MOST_NODES},
    )
    return None if found.x is None else Solution(table, found.x)


def _split(group: Group, compute: Tier, placed: tuple[int, int]) -> Split:
    """On borders that the tensors have."""
    near, hosted = placed
    total = group.num_bytes
    kept = leading_border_bytes(group.tensors, near)
    if compute is Tier.CPU:
        return Split(gpu_bytes=0, cpu_bytes=kept, disk_bytes=total - kept)
    upto = max(kept, leading_border_bytes(group.tensors, near + hosted))
    return Split(gpu_bytes=kept, cpu_bytes=upto - kept, disk_bytes=total - upto)
