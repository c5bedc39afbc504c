"""The mixed-integer linear program of one candidate: where weights, keys and values lie so that the
slowest lane of a sweep is as fast as it can be. Chooses no block and no micro-batch.

Columns: for each group of equal layers, for head and embedding, granules on the compute tier and in
host memory; pages of keys and values on each tier; a slot's bytes; the sweep's seconds. Rows: each
tier's budget, the lanes below the sweep's seconds. Solved by HiGHS.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from engine.config import Budgets
from engine.planning import roofline
from engine.planning.cost import (
    KV_PAGE_TOKENS,
    fetch_bytes,
    peak_bytes,
)
from engine.planning.planners.candidates import Away, Candidate
from engine.planning.policy import Policy, Split, Tier
from engine.planning.roofline import Model
from engine.planning.shape import Placeable, leading_border_bytes, total_bytes
from engine.planning.sweep import Sweep

_MOST_ROUNDS: Final = 6
_RELATIVE_GAP: Final = 1e-4
_MOST_NODES: Final = 400
_SPARE_SHARE: Final = 0.25
"""Of the pages that keys and values take in steady state, as many more where they are left over."""

_HEAD_FIRST: Final = 1e-3
"""Of a byte's seconds less for the head: what streams of it has the least compute to hide behind."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """`count` alike runs of tensors, placed alike, by multiples of `granule_bytes`."""

    name: str
    tensors: tuple[Placeable, ...]
    count: int

    @property
    def num_bytes(self) -> int:
        return total_bytes(self.tensors)

    @property
    def granule_bytes(self) -> int:
        return max((tensor.granule_bytes for tensor in self.tensors), default=1)


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
        self.num_solved = 0

    @property
    def num_columns(self) -> int:
        return 2 * len(self._groups) + len(Tier) + 2

    def place(self, candidate: Candidate) -> Policy | None:
        """The candidate with everything placed; None where that is not possible.

        The program's rows are linear and its result is put on legal borders, so what it takes is
        checked by `cost.peak_bytes` itself; where that is more than a budget, the program is solved
        again with as much less.
        """
        limits = dict(self._limits)
        for _ in range(_MOST_ROUNDS):
            policy = self._solve(candidate, limits)
            if policy is None:
                return None
            peaks = peak_bytes(self._model.shape, policy)
            over = {tier: peaks[tier] - limit for tier, limit in self._limits.items()}
            if max(over.values()) <= 0:
                return self._with_spare_pages(policy, over)
            for tier, missing in over.items():
                limits[tier] -= max(0, missing)
        return None

    def _with_spare_pages(self, policy: Policy, over: dict[Tier, int]) -> Policy:
        """Of what is left of a tier that has keys and values, some for them: rows are uneven."""
        page_bytes = KV_PAGE_TOKENS * self._model.shape.kv_bytes_per_token
        spare = {
            tier: min(-over[tier], int(policy.kv[tier] * _SPARE_SHARE)) // page_bytes * page_bytes
            for tier in Tier
        }
        return dataclasses.replace(
            policy,
            kv=Split(**{f"{tier}_bytes": policy.kv[tier] + spare[tier] for tier in Tier}),
        )

    def least_seconds(self, candidate: Candidate) -> float:
        """Of a sweep, wherever things lie: what is computed is computed."""
        everywhere = candidate.base
        terms = Sweep(self._model, everywhere).terms(candidate.load, kept_tokens=0.0)
        seconds = terms.gemm_s + terms.head_s + terms.expand_s + terms.overhead_s
        on_cpu = everywhere.compute is Tier.CPU
        return seconds + (terms.attention_s if on_cpu else 0.0)

    def _solve(self, candidate: Candidate, limits: dict[Tier, int]) -> Policy | None:
        table = _Table(self._model, candidate, groups=self._groups, limits=limits)
        self.num_solved += 1
        found = milp(
            table.objective,
            constraints=LinearConstraint(
                np.array(table.rows), -np.inf, np.array(table.limits, dtype=float)
            ),
            bounds=Bounds(np.zeros(table.width), np.array(table.most, dtype=float)),
            integrality=np.array(table.integral),
            options={"mip_rel_gap": _RELATIVE_GAP, "node_limit": _MOST_NODES},
        )
        return None if found.x is None else self._policy(candidate, table, found.x)

    def _policy(self, candidate: Candidate, table: "_Table", x: Sequence[float]) -> Policy:
        splits = {
            group: _split(group, candidate.base.compute, table.placed(x, index))
            for index, group in enumerate(self._groups)
        }
        by_tensors = {group.tensors: splits[group] for group in self._layers}
        by_name = {group.name: split for group, split in splits.items()}
        return dataclasses.replace(
            candidate.base,
            layer_splits=tuple(by_tensors[tensors] for tensors in self._model.shape.layers),
            head_split=by_name.get("head"),
            embedding_split=by_name.get("embedding"),
            kv=table.kv(x),
        )


class _Table:
    """The program's figures. Columns are scaled: granules, pages, MiB, and parts of the sweep."""

    def __init__(
        self,
        model: Model,
        candidate: Candidate,
        *,
        groups: Sequence[Group],
        limits: dict[Tier, int],
    ) -> None:
        """`limits` are what each tier may hold."""
        self._model = model
        self._candidate = candidate
        self._groups = groups
        self._compute = candidate.base.compute
        self._page_bytes = KV_PAGE_TOKENS * model.shape.kv_bytes_per_token
        self._kv = 2 * len(groups)
        self._slot = self._kv + len(Tier)
        self._time = self._slot + 1
        self.width = self._time + 1
        self.rows: list[list[float]] = []
        self.limits: list[float] = []
        self.integral = [1] * self._slot + [0, 0]
        self.most = self._most()
        self._lanes = self._lane_seconds()
        self._add_budgets(limits)
        self._add_splits()
        self._add_kv()
        self._add_lanes()
        self.objective = self._objective()

    # -- what a solution says --------------------------------------------------------------

    def placed(self, x: Sequence[float], index: int) -> tuple[int, int]:
        """Bytes of each of a group on the compute tier, and in host memory beside a GPU."""
        group = self._groups[index]
        near, hosted = (round(x[2 * index + part]) * group.granule_bytes for part in (0, 1))
        near = min(near, group.num_bytes)
        return near, min(hosted, group.num_bytes - near)

    def kv(self, x: Sequence[float]) -> Split:
        pages = [max(0, round(x[self._kv + at])) for at in range(len(Tier))]
        gpu, cpu, disk = (count * self._page_bytes for count in pages)
        return Split(gpu_bytes=gpu, cpu_bytes=cpu, disk_bytes=disk)

    # -- columns ---------------------------------------------------------------------------

    def _granules(self, group: Group) -> int:
        return math.ceil(group.num_bytes / group.granule_bytes)

    def _most(self) -> list[float]:
        on_gpu = self._compute is Tier.GPU
        most: list[float] = []
        for group in self._groups:
            count = self._granules(group)
            most += [count, count if on_gpu else 0]
        pages = math.ceil(self._candidate.kept_tokens / KV_PAGE_TOKENS)
        is_away = self._candidate.away is not Away.NONE
        for tier in Tier:
            there = tier is self._compute or (is_away and not (tier is Tier.GPU and not on_gpu))
            most.append(pages if there else 0)
        return [*most, np.inf, np.inf]

    def _row(self, coefficients: dict[int, float], limit: float) -> None:
        row = [0.0] * self.width
        for column, value in coefficients.items():
            row[column] = value
        scale = max(1e-12, *(abs(value) for value in row))
        self.rows.append([value / scale for value in row])
        self.limits.append(limit / scale)

    # -- rows ------------------------------------------------------------------------------

    def _add_budgets(self, limits: dict[Tier, int]) -> None:
        fixed = self._fixed_bytes()
        used: dict[Tier, dict[int, float]] = {tier: {} for tier in Tier}
        for index, group in enumerate(self._groups):
            granule = group.granule_bytes * group.count
            total = group.num_bytes * group.count
            used[self._compute][2 * index] = granule
            used[Tier.DISK] |= {2 * index: -granule, 2 * index + 1: -granule}
            fixed[Tier.DISK] += total
            if self._compute is Tier.GPU:
                used[Tier.CPU][2 * index + 1] = granule
        slots = self._candidate.base.num_slots * 2**20
        used[self._compute][self._slot] = slots
        used[Tier.CPU][self._slot] = slots
        for at, tier in enumerate(Tier):
            used[tier][self._kv + at] = self._page_bytes
            self._row(used[tier], limits[tier] - fixed[tier])

    def _fixed_bytes(self) -> dict[Tier, int]:
        """What each tier holds whatever is placed where, by `cost`'s own terms."""
        base, shape = self._candidate.base, self._model.shape
        fixed = peak_bytes(shape, base)
        for group in self._groups:
            fixed[base.compute] -= group.num_bytes * group.count
        if self._candidate.away is Away.FETCHED:
            kv = Split(gpu_bytes=0, cpu_bytes=0, disk_bytes=2**60)
            fixed[base.compute] += fetch_bytes(shape, dataclasses.replace(base, kv=kv))
        return fixed

    def _add_splits(self) -> None:
        """No more is placed than there is; a slot holds what streams of a layer."""
        for index, group in enumerate(self._groups):
            near, hosted = 2 * index, 2 * index + 1
            self._row({near: 1.0, hosted: 1.0}, self._granules(group))
            if group.name == "layers":
                granule = group.granule_bytes
                self._row({near: -granule, self._slot: -(2.0**20)}, -group.num_bytes)

    def _add_kv(self) -> None:
        pages = math.ceil(self._candidate.kept_tokens / KV_PAGE_TOKENS)
        self._row({self._kv + at: -1.0 for at in range(len(Tier))}, -pages)

    def _add_lanes(self) -> None:
        """Each lane's seconds, less what the sweep takes, are at most 0."""
        for constant, coefficients in self._lanes:
            self._row({**coefficients, self._time: -1.0}, -constant)

    def _lane_seconds(self) -> list[tuple[float, dict[int, float]]]:
        """(seconds whatever is placed where, seconds by column) of each lane."""
        model, base, load = self._model, self._candidate.base, self._candidate.load
        everywhere = Sweep(model, base).terms(load, kept_tokens=0.0)
        disk, bus, compute = 0.0, 0.0, everywhere.gemm_s + everywhere.head_s
        compute += everywhere.expand_s + everywhere.overhead_s
        disk_columns: dict[int, float] = {}
        bus_columns: dict[int, float] = {}
        compute_columns: dict[int, float] = {}
        for index, group in enumerate(self._groups):
            near, hosted = 2 * index, 2 * index + 1
            granule = group.granule_bytes * group.count
            if group.name == "embedding":
                # What does not reside is read row by row, as tokens ask for it.
                row = max(1.0, group.num_bytes / model.shape.vocab_size)
                rows_s = load.tokens * row / model.hardware.disk_read.at(row)
                part = rows_s * group.granule_bytes / group.num_bytes
                compute += rows_s
                compute_columns |= {near: -part, hosted: -part}
                continue
            total = group.num_bytes * group.count
            rate = 1 / model.hardware.disk_read.at(max(1.0, group.num_bytes))
            disk += total * rate
            disk_columns |= {near: -granule * rate, hosted: -granule * rate}
            if self._compute is Tier.GPU:
                per_byte = roofline.bus_s(model.hardware, 1.0)
                bus += total * per_byte
                bus_columns[near] = -granule * per_byte
        beside_columns: dict[int, float] = {}
        self._add_attention(compute_columns, beside_columns, bus_columns, disk_columns)
        lanes = [(disk, disk_columns), (bus, bus_columns), (compute, compute_columns)]
        return [*lanes, (0.0, beside_columns)] if beside_columns else lanes

    def _add_attention(
        self,
        compute: dict[int, float],
        beside: dict[int, float],
        bus: dict[int, float],
        disk: dict[int, float],
    ) -> None:
        """Seconds that a page on each tier costs in each lane: a page's share of the rows."""
        model, base, load = self._model, self._candidate.base, self._candidate.load
        pages = math.ceil(self._candidate.kept_tokens / KV_PAGE_TOKENS)
        for at, tier in enumerate(Tier):
            column = self._kv + at
            if not self.most[column]:
                continue
            alone = dataclasses.replace(base, kv=Split.on(tier, pages * self._page_bytes))
            terms = Sweep(model, alone).terms(load, kept_tokens=self._candidate.kept_tokens)
            compute[column] = terms.attention_s / pages
            if terms.beside_s:
                beside[column] = terms.beside_s / pages
            if terms.kv_transfer_s:
                bus[column] = terms.kv_transfer_s / pages
            if terms.kv_disk_s:
                disk[column] = terms.kv_disk_s / pages

    def _objective(self) -> list[float]:
        """The sweep's seconds, and next to nothing for each lane, so that of placements alike in
        the slowest the one is chosen that leaves the others the most room.
        """
        values = [0.0] * self.width
        values[self._time] = 1.0
        for _, coefficients in self._lanes:
            for column, value in coefficients.items():
                values[column] += 1e-3 * value
        for index, group in enumerate(self._groups):
            if group.name == "head":
                values[2 * index] *= 1.0 + _HEAD_FIRST
        return values


def _split(group: Group, compute: Tier, placed: tuple[int, int]) -> Split:
    """On borders that the tensors have."""
    near, hosted = placed
    total = group.num_bytes
    kept = leading_border_bytes(group.tensors, near)
    if compute is Tier.CPU:
        return Split(gpu_bytes=0, cpu_bytes=kept, disk_bytes=total - kept)
    upto = max(kept, leading_border_bytes(group.tensors, near + hosted))
    return Split(gpu_bytes=kept, cpu_bytes=upto - kept, disk_bytes=total - upto)
