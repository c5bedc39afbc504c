"""One sweep under a policy: its roofline's terms over all layers, and how long they take together."""

import collections
import dataclasses
from collections.abc import Mapping

from engine.planning import roofline
from engine.planning.load import Load
from engine.planning.pipeline import Stage, UnitTimes, sweep_seconds
from engine.planning.policy import Policy, Split, Tier
from engine.planning.prediction import LANES, SweepTerms
from engine.planning.roofline import Model
from engine.planning.units import Units, units_of

_COMPUTE = LANES["compute"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Alike:
    """Layers that cost the same: their numbers, the first of them, and what streams of each."""

    layers: tuple[int, ...]
    split: Split
    units: Units

    @property
    def first(self) -> int:
        return self.layers[0]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Lanes:
    """Seconds by term: in one layer of each kind, and in all of the sweep."""

    per_layer: list[dict[str, float]]
    total: dict[str, float]


class Sweep:
    """Sweeps of one model under one policy; loads differ."""

    def __init__(self, model: Model, policy: Policy) -> None:
        self._model = model
        self._policy = policy
        self._alike = _grouped(model, policy)
        tiles = roofline.head_tiles(policy, layer_unit_bytes=self._largest_unit_bytes())
        # All alike, and alike for every load.
        self._tiles = [self._times(tile, Units(count=1, on_disk=1)) for tile in tiles[:1]]
        self._tiles *= len(tiles)

    def _largest_unit_bytes(self) -> float:
        return max(
            (each.split.streamed_bytes(self._policy.compute) for each in self._alike), default=0
        )

    def busy(self, load: Load, *, kept_tokens: float) -> SweepTerms:
        """How long each link and unit is busy, and not what one waits for another."""
        return SweepTerms(**self._lanes(load, kept_tokens).total)

    def terms(self, load: Load, *, kept_tokens: float) -> SweepTerms:
        """`bubble_s` is what the sweep takes beyond its slowest lane, or with no overlap nothing."""
        return self.timed(load, kept_tokens=kept_tokens)[0]

    def seconds(self, load: Load, *, kept_tokens: float) -> float:
        """Of one sweep among many of that load."""
        return self.timed(load, kept_tokens=kept_tokens)[1]

    def timed(self, load: Load, *, kept_tokens: float) -> tuple[SweepTerms, float]:
        """Both."""
        found = self._lanes(load, kept_tokens)
        terms = SweepTerms(**found.total)
        lanes = [sum(found.total[name] for name in names) for names in LANES.values()]
        if not self._policy.overlap:
            return terms, sum(lanes, start=0.0)
        # Where layers come in several units, one slot is kept to spare.
        num_slots = self._policy.num_slots - (self._policy.unit_bytes is not None)
        swept_s = sweep_seconds(self._stages(load, found), num_slots=num_slots, overlap=True)
        swept_s = max(swept_s, *lanes)
        return dataclasses.replace(terms, bubble_s=swept_s - max(lanes)), swept_s

    def _lanes(self, load: Load, kept_tokens: float) -> _Lanes:
        model, policy = self._model, self._policy
        shares = roofline.kv_shares(model, policy, kept_tokens)
        kv_disk_s = roofline.kv_disk_s(model, policy, load, shares[Tier.DISK])
        fetched_s = kv_disk_s / max(1, model.shape.num_layers)
        per_layer = [self._layer(load, shares, each, fetched_s=fetched_s) for each in self._alike]
        total: dict[str, float] = collections.defaultdict(float)
        for each, of_layer in zip(self._alike, per_layer, strict=True):
            for name, value in of_layer.items():
                total[name] += value * len(each.layers)
        for name, value in self._last(load).items():
            total[name] += value
        total["kv_disk_s"] += kv_disk_s
        total["store_s"] += roofline.disk_store_s(model, load, shares[Tier.DISK])
        total["disk_read_s"] += sum(tile.read_s for tile in self._tiles)
        total["bus_s"] += sum(tile.copy_s for tile in self._tiles)
        return _Lanes(per_layer=per_layer, total=total)

    def _layer(
        self, load: Load, shares: Mapping[Tier, float], each: _Alike, *, fetched_s: float
    ) -> dict[str, float]:
        """One layer's seconds, by term."""
        model, policy, layer = self._model, self._policy, each.first
        times = self._times(each.split, each.units)
        away = {tier: share for tier, share in shares.items() if tier is not policy.compute}
        beside = sum(away.values()) if policy.attends_beside else 0.0
        # With the CPU as compute tier what lives on disk is attended by the same cores.
        is_one_unit = policy.compute is Tier.CPU
        here = 1.0 if is_one_unit else 1.0 - beside
        kv_s, store_s = roofline.moved_s(model, policy, load, shares, layer=layer)
        return {
            "disk_read_s": times.read_s,
            "bus_s": times.copy_s,
            "kv_transfer_s": kv_s,
            "store_s": store_s,
            "gemm_s": roofline.gemm_s(model, policy, load, layer=layer),
            "elementwise_s": roofline.elementwise_s(model, policy, load, layer=layer),
            "expand_s": roofline.expand_s(
                model,
                policy,
                load,
                model.shape.layers[layer],
                streamed_share=each.split.streamed_bytes(policy.compute)
                / max(1, each.split.total_bytes),
            ),
            "attention_s": roofline.attention_s(
                model, policy, load, layer=layer, tier=policy.compute, share=here
            ),
            "beside_s": roofline.attention_s(
                model, policy, load, layer=layer, tier=Tier.CPU, share=1.0 - here
            ),
            "overhead_s": roofline.overhead_s(
                model,
                policy,
                load,
                layer=layer,
                num_units=each.units.count,
                read_s=times.read_s,
                fetched_s=fetched_s,
            ),
        }

    def _last(self, load: Load) -> dict[str, float]:
        """What ends a sweep: the head, and what sweep and rows cost beside arithmetic."""
        model, policy = self._model, self._policy
        return {
            "head_s": roofline.head_s(model, policy, load),
            "expand_s": roofline.head_expand_s(model, policy, load),
            "overhead_s": roofline.sweep_overhead_s(model, policy, load),
        }

    def _stages(self, load: Load, found: _Lanes) -> list[Stage]:
        """In the order that they are visited: layers, the head's tiles, sampling."""
        num_layers = self._model.shape.num_layers
        disk_kv_s = found.total["kv_disk_s"] / max(1, num_layers)
        count = roofline.micro_batches(self._policy, load)
        by_layer: dict[int, Stage] = {}
        for each, terms in zip(self._alike, found.per_layer, strict=True):
            times = (terms["disk_read_s"], terms["bus_s"], _layer_s(terms, disk_kv_s, count))
            num_units = max(1, each.units.count)
            unit = UnitTimes(*(seconds / num_units for seconds in times))
            by_layer |= dict.fromkeys(each.layers, Stage(unit, num_units, count))
        stages = [by_layer[layer] for layer in range(num_layers)]
        last = self._last(load)
        head_s = last["head_s"] + last["expand_s"]
        if self._tiles:
            part_s = head_s / len(self._tiles)
            stages += [Stage(self._tiles[0]._replace(compute_s=part_s))] * len(self._tiles)
            head_s = 0.0
        return [*stages, Stage(UnitTimes(0.0, 0.0, head_s + last["overhead_s"]))]

    def _times(self, split: Split, units: Units) -> UnitTimes:
        """Of all units together: each is read at the rate of its own size."""
        policy, hardware = self._policy, self._model.hardware
        read_s = roofline.disk_read_s(
            hardware, split.disk_bytes, unit_bytes=split.disk_bytes / max(1, units.on_disk)
        )
        streamed = split.streamed_bytes(policy.compute)
        copy_s = roofline.bus_s(hardware, streamed) if policy.compute is Tier.GPU else 0.0
        return UnitTimes(read_s, copy_s, 0.0)


def _layer_s(terms: Mapping[str, float], disk_kv_s: float, num_micro_batches: int) -> float:
    """What a layer's visit takes: the slowest of what goes on beside compute, and of each of the
    others a micro-batch's part, which nothing of the same layer hides.
    """
    beside = [
        sum(terms.get(name, 0.0) for name in _COMPUTE),
        terms["beside_s"],
        terms["kv_transfer_s"] + disk_kv_s,
        terms["store_s"],
    ]
    slowest = max(beside)
    return slowest + (sum(beside) - slowest) / num_micro_batches


def _grouped(model: Model, policy: Policy) -> list[_Alike]:
    groups: dict[tuple[int, Split], list[int]] = {}
    for layer, (kind, split) in enumerate(zip(model.kinds, policy.layer_splits, strict=True)):
        groups.setdefault((kind, split), []).append(layer)
    return [
        _Alike(
            layers=tuple(layers),
            split=split,
            units=units_of(model.shape.layers[layers[0]], split, policy),
        )
        for (_, split), layers in groups.items()
    ]
