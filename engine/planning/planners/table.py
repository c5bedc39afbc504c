"""The figures of one candidate's program: columns, rows and objective. Solves nothing.

Columns: for each group of equal layers, for head and embedding, granules on the compute tier and in
host memory; pages of keys and values on each tier; a slot's MiB; the sweep's seconds. Rows: each
tier's budget, what a slot holds, the lanes below the sweep's seconds.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from engine.planning import roofline
from engine.planning.cost import (
    HEAD_TILE_BYTES,
    KV_PAGE_TOKENS,
    fetch_bytes,
    peak_bytes,
    widened_bytes,
)
from engine.planning.planners.candidates import Away, Candidate
from engine.planning.policy import Split, Tier
from engine.planning.roofline import Model
from engine.planning.shape import Placeable, total_bytes
from engine.planning.sweep import Sweep

_HEAD_FIRST: Final = 1e-3
"""Of a byte's seconds more for the head: what streams of it has the least compute to hide behind."""


_WHOLE: Final = 1e-6
"""So near to a whole number a part is one."""


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


class Table:
    """The program's figures. Columns are scaled: granules, pages, MiB, and parts of the sweep."""

    def __init__(
        self,
        model: Model,
        candidate: Candidate,
        *,
        groups: Sequence[Group],
    ) -> None:
        self._model = model
        self._candidate = candidate
        self.groups = groups
        self._compute = candidate.base.compute
        self.page_bytes = KV_PAGE_TOKENS * model.shape.kv_bytes_per_token
        self.kv_column = 2 * len(groups)
        self._slot = self.kv_column + len(Tier)
        self.time_column = self._slot + 1
        self.width = self.time_column + 1
        self.rows: list[list[float]] = []
        self._limits: list[float] = []
        self._scales: list[float] = []
        self.integral = [1] * self._slot + [0, 0]
        self.most = self._most()
        self._lanes = self._lane_seconds()
        self._add_budgets()
        self._add_splits()
        self._add_kv()
        self._add_lanes()
        self.objective = self._objective()

    # -- columns ---------------------------------------------------------------------------

    def _granules(self, group: Group) -> int:
        return math.ceil(group.num_bytes / group.granule_bytes)

    def _most(self) -> list[float]:
        on_gpu = self._compute is Tier.GPU
        most: list[float] = []
        for group in self.groups:
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
        self._limits.append(limit / scale)
        self._scales.append(scale)

    # -- rows ------------------------------------------------------------------------------

    def limits(self, tiers: Mapping[Tier, int]) -> list[float]:
        """Of each row, where tiers may hold so many bytes."""
        found = list(self._limits)
        for at, tier in enumerate(Tier):
            found[at] += tiers[tier] / self._scales[at]
        return found

    def _add_budgets(self) -> None:
        """The first rows."""
        fixed = self._fixed_bytes()
        used: dict[Tier, dict[int, float]] = {tier: {} for tier in Tier}
        for index, group in enumerate(self.groups):
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
            used[tier][self.kv_column + at] = self.page_bytes
        if self._attends_on_cpu:
            noted_bytes = KV_PAGE_TOKENS * self._model.shape.lookup_bytes_per_token
            for at, tier in enumerate(Tier):
                if tier is not Tier.GPU:
                    column = self.kv_column + at
                    used[Tier.CPU][column] = used[Tier.CPU].get(column, 0) + noted_bytes
        for tier in Tier:
            self._row(used[tier], -fixed[tier])

    @property
    def _attends_on_cpu(self) -> bool:
        return self._compute is Tier.CPU or self._candidate.away is Away.BESIDE

    def _fixed_bytes(self) -> dict[Tier, int]:
        """What each tier holds whatever is placed where, by `cost`'s own terms."""
        base, shape = self._candidate.base, self._model.shape
        fixed = peak_bytes(shape, base)
        for group in self.groups:
            fixed[base.compute] -= group.num_bytes * group.count
        if self._candidate.away is Away.FETCHED:
            most = self._candidate.kept_tokens * shape.kv_bytes_per_token
            kv = Split(gpu_bytes=0, cpu_bytes=0, disk_bytes=most)
            fetched_bytes = fetch_bytes(shape, dataclasses.replace(base, kv=kv))
            for tier in {base.compute, Tier.CPU}:
                fixed[tier] += fetched_bytes
        if self._attends_on_cpu:
            fixed[Tier.CPU] += widened_bytes(shape, self._candidate.kept_tokens)
        return fixed

    def _add_splits(self) -> None:
        """No more is placed than there is; a slot holds what streams of a layer."""
        for index, group in enumerate(self.groups):
            near, hosted = 2 * index, 2 * index + 1
            self._row({near: 1.0, hosted: 1.0}, self._granules(group))
            unit_bytes = self._candidate.base.unit_bytes
            if group.name == "layers" and unit_bytes is not None:
                largest = min(group.num_bytes, max(unit_bytes, group.granule_bytes))
                self._row({self._slot: -(2.0**20)}, -largest)
            elif group.name != "embedding" and unit_bytes is None:
                # Of the head a tile at most: all of one that streams in part is under-estimated.
                most_bytes = HEAD_TILE_BYTES if group.name == "head" else group.num_bytes
                share = min(1.0, most_bytes / group.num_bytes)
                granule = share * group.granule_bytes
                self._row({near: -granule, self._slot: -(2.0**20)}, -share * group.num_bytes)

    def _add_kv(self) -> None:
        pages = math.ceil(self._candidate.kept_tokens / KV_PAGE_TOKENS)
        self._row({self.kv_column + at: -1.0 for at in range(len(Tier))}, -pages)

    def _add_lanes(self) -> None:
        """Each lane's seconds, less what the sweep takes, are at most 0."""
        for constant, coefficients in self._lanes:
            self._row({**coefficients, self.time_column: -1.0}, -constant)

    def _lane_seconds(self) -> list[tuple[float, dict[int, float]]]:
        """(seconds whatever is placed where, seconds by column) of each lane."""
        model, base, load = self._model, self._candidate.base, self._candidate.load
        everywhere = Sweep(model, base).busy(load, kept_tokens=0.0)
        disk, bus, compute = 0.0, 0.0, everywhere.gemm_s + everywhere.head_s
        compute += everywhere.elementwise_s + everywhere.expand_s + everywhere.overhead_s
        disk_columns: dict[int, float] = {}
        bus_columns: dict[int, float] = {}
        compute_columns: dict[int, float] = {}
        for index, group in enumerate(self.groups):
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
            rate = 1 / model.hardware.disk_read.at(max(1.0, self._read_bytes(group)))
            disk += total * rate
            disk_columns |= {near: -granule * rate, hosted: -granule * rate}
            if self._compute is Tier.GPU:
                per_byte = roofline.bus_s(model.hardware, 1.0)
                bus += total * per_byte
                bus_columns[near] = -granule * per_byte
            laid_out_s = self._laid_out_s(group) * group.count
            compute += laid_out_s
            compute_columns[near] = -laid_out_s * group.granule_bytes / group.num_bytes
        lost = roofline.lost_s(model, base, read_s=1.0, fetched_s=0.0)
        compute += lost * disk
        for column, per_granule in disk_columns.items():
            compute_columns[column] = compute_columns.get(column, 0.0) + lost * per_granule
        beside_columns: dict[int, float] = {}
        self._add_attention(compute_columns, beside_columns, bus_columns, disk_columns)
        lanes = [(disk, disk_columns), (bus, bus_columns), (compute, compute_columns)]
        return [*lanes, (0.0, beside_columns)] if beside_columns else lanes

    def _laid_out_s(self, group: Group) -> float:
        """What all of one run's tensors cost more where they stream than where they reside."""
        if group.name == "head":
            return 0.0
        streamed_s, resident_s = (
            roofline.expand_s(
                self._model,
                self._candidate.base,
                self._candidate.load,
                group.tensors,
                streamed_share=share,
            )
            for share in (1.0, 0.0)
        )
        return streamed_s - resident_s

    def _read_bytes(self, group: Group) -> int:
        """At once: a unit, or a layer, or a tile of the head. A part that resides is not read with
        it: the rate is that of the most that may be.
        """
        unit_bytes = self._candidate.base.unit_bytes
        if unit_bytes is not None:
            return min(group.num_bytes, unit_bytes)
        if group.name == "head":
            layer_bytes = max(self._model.shape.layer_bytes, default=0)
            return min(group.num_bytes, max(HEAD_TILE_BYTES, layer_bytes))
        return group.num_bytes

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
            column = self.kv_column + at
            if not self.most[column]:
                continue
            alone = dataclasses.replace(base, kv=Split.on(tier, pages * self.page_bytes))
            terms = Sweep(model, alone).busy(load, kept_tokens=self._candidate.kept_tokens)
            lost_s = roofline.lost_s(model, base, read_s=0.0, fetched_s=terms.kv_disk_s)
            compute[column] = (terms.attention_s + lost_s) / pages
            if terms.beside_s:
                beside[column] = terms.beside_s / pages
            if terms.kv_transfer_s:
                bus[column] = terms.kv_transfer_s / pages
            if terms.kv_disk_s:
                disk[column] = terms.kv_disk_s / pages

    @property
    def rounding_bytes(self) -> int:
        """That a tier may hold more once granules and pages are whole: what another one gave up, and slots
        that hold a granule more.
        """
        granule = max(group.granule_bytes for group in self.groups)
        moved = sum(group.granule_bytes * group.count for group in self.groups)
        slots = self._candidate.base.num_slots * granule
        return moved + slots + (len(Tier) - 1) * self.page_bytes

    def rounded(self, parts: "Solution", limits: Mapping[Tier, int]) -> "Solution | None":
        """Granules and pages in whole numbers: what is cut off lies a tier further away, of keys and values
        on the slowest that may have any. None where that does not fit.
        """
        rows, most = np.array(self.rows), np.array(self.limits(limits))
        x = np.floor(np.array(parts.x) + _WHOLE)
        x[[self._slot, self.time_column]] = 0.0
        for near in range(0, self.kv_column, 2):
            if self.most[near + 1]:
                kept = math.floor(parts.x[near] + parts.x[near + 1] + _WHOLE)
                x[near + 1] = kept - x[near]
        pages = math.ceil(self._candidate.kept_tokens / KV_PAGE_TOKENS)
        tiers = [column for column in range(self.kv_column, self._slot) if self.most[column]]
        x[tiers[-1]] += max(0.0, pages - x[tiers].sum())
        for column in (self._slot, self.time_column):
            asking = rows[:, column] < 0
            lacking = (rows[asking] @ x - most[asking]) / -rows[asking, column]
            x[column] = max(0.0, *lacking)
        fits = bool(np.all(rows @ x <= most + _WHOLE) and np.all(x <= np.array(self.most)))
        return Solution(self, x.tolist()) if fits else None

    def _objective(self) -> list[float]:
        """The sweep's seconds, and next to nothing for each lane, so that of placements alike in
        the slowest the one is chosen that leaves the others the most room.
        """
        values = [0.0] * self.width
        values[self.time_column] = 1.0
        for _, coefficients in self._lanes:
            for column, value in coefficients.items():
                values[column] += 1e-3 * value
        for index, group in enumerate(self.groups):
            if group.name == "head":
                values[2 * index] *= 1.0 + _HEAD_FIRST
        return values


class Solution:
    """What a table's columns came out as."""

    def __init__(self, table: Table, x: Sequence[float]) -> None:
        self._table = table
        self.x = x

    @property
    def seconds(self) -> float:
        """Of the slowest lane."""
        return float(self.x[self._table.time_column])

    def placed(self, index: int) -> tuple[int, int]:
        """Bytes of each of a group on the compute tier, and in host memory beside a GPU."""
        group = self._table.groups[index]
        counts = (round(self.x[2 * index + part]) for part in (0, 1))
        near, hosted = (count * group.granule_bytes for count in counts)
        near = min(near, group.num_bytes)
        return near, min(hosted, group.num_bytes - near)

    @property
    def kv(self) -> Split:
        """Of whole pages."""
        first, page_bytes = self._table.kv_column, self._table.page_bytes
        gpu, cpu, disk = (max(0, round(self.x[first + at])) * page_bytes for at in range(len(Tier)))
        return Split(gpu_bytes=gpu, cpu_bytes=cpu, disk_bytes=disk)
