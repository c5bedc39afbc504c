"""One sweep under a policy: its roofline's terms over all layers, and how long they take together."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

from engine.planning import roofline
from engine.planning.load import Load
from engine.planning.pipeline import UnitTimes, sweep_seconds
from engine.planning.policy import Policy, Split, Tier
from engine.planning.prediction import LANES, SweepTerms
from engine.planning.roofline import Model

_COMPUTE = LANES["compute"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Alike:
    """Layers that cost the same: their numbers, the first of them, and what streams of each."""

    layers: tuple[int, ...]
    split: Split

    @property
    def first(self) -> int:
        return self.layers[0]


class Sweep:
    """Sweeps of one model under one policy; loads differ."""

    def __init__(self, model: Model, policy: Policy) -> None:
        self._model = model
        self._policy = policy
        self._alike = _grouped(model, policy)
        self._unit_bytes = max(
            (each.split.streamed_bytes(policy.compute) for each in self._alike), default=0
        )
        self._tiles = roofline.head_tiles(policy, layer_unit_bytes=self._unit_bytes)

    def terms(self, load: Load, *, kept_tokens: float) -> SweepTerms:
        """`bubble_s` is what the sweep takes beyond its slowest lane, or with no overlap nothing."""
        return self._with_seconds(load, kept_tokens)[0]

    def seconds(self, load: Load, *, kept_tokens: float) -> float:
        """Of one sweep among many of that load."""
        return self._with_seconds(load, kept_tokens)[1]

    def _with_seconds(self, load: Load, kept_tokens: float) -> tuple[SweepTerms, float]:
        model, policy = self._model, self._policy
        shares = roofline.kv_shares(model, policy, kept_tokens)
        per_layer = [self._layer(load, shares, each) for each in self._alike]
        total: dict[str, float] = collections.defaultdict(float)
        for each, of_layer in zip(self._alike, per_layer, strict=True):
            for name, value in of_layer.items():
                total[name] += value * len(each.layers)
        for name, value in self._last(load).items():
            total[name] += value
        total["kv_disk_s"] += roofline.kv_disk_s(model, policy, load, shares[Tier.DISK])
        total["store_s"] += roofline.disk_store_s(model, load, shares[Tier.DISK])
        tiles = [self._times(tile) for tile in self._tiles]
        total["disk_read_s"] += sum(tile.read_s for tile in tiles)
        total["bus_s"] += sum(tile.copy_s for tile in tiles)
        terms = SweepTerms(**total)
        lanes = [sum(total[name] for name in names) for names in LANES.values()]
        if not policy.overlap:
            return terms, sum(lanes, start=0.0)
        units = self._units(load, per_layer, tiles, total)
        # Where layers come in several units, one slot is kept to spare.
        num_slots = policy.num_slots - (policy.unit_bytes is not None)
        swept_s = sweep_seconds(units, num_slots=num_slots, overlap=True)
        swept_s = max(swept_s, *lanes)
        return dataclasses.replace(terms, bubble_s=swept_s - max(lanes)), swept_s

    def _layer(self, load: Load, shares: Mapping[Tier, float], each: _Alike) -> dict[str, float]:
        """One layer's seconds, by term."""
        model, policy, layer = self._model, self._policy, each.first
        times = self._times(each.split)
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
                model, policy, model.shape.layers[layer], roofline.micro_batches(policy, load)
            ),
            "attention_s": roofline.attention_s(
                model, policy, load, layer=layer, tier=policy.compute, share=here
            ),
            "beside_s": roofline.attention_s(
                model, policy, load, layer=layer, tier=Tier.CPU, share=1.0 - here
            ),
            "overhead_s": roofline.overhead_s(model, policy, load),
        }

    def _last(self, load: Load) -> dict[str, float]:
        """What ends a sweep: the head, and what sweep and rows cost beside arithmetic."""
        model, policy = self._model, self._policy
        return {
            "head_s": roofline.head_s(model, policy, load),
            "expand_s": roofline.expand_s(model, policy, model.shape.head_tensors, 1),
            "overhead_s": roofline.sweep_overhead_s(model, policy, load),
        }

    def _units(
        self,
        load: Load,
        per_layer: Sequence[Mapping[str, float]],
        tiles: Sequence[UnitTimes],
        total: Mapping[str, float],
    ) -> list[UnitTimes]:
        """In the order that they are visited: layers, the head's tiles, sampling."""
        num_layers = self._model.shape.num_layers
        disk_kv_s = total["kv_disk_s"] / max(1, num_layers)
        count = roofline.micro_batches(self._policy, load)
        by_layer: dict[int, UnitTimes] = {}
        for each, terms in zip(self._alike, per_layer, strict=True):
            times = UnitTimes(
                terms["disk_read_s"], terms["bus_s"], _layer_s(terms, disk_kv_s, count)
            )
            by_layer |= dict.fromkeys(each.layers, times)
        units = [
            unit
            for layer in range(num_layers)
            for unit in self._cut(by_layer[layer], self._policy.layer_splits[layer])
        ]
        last = self._last(load)
        head_s = last["head_s"] + last["expand_s"]
        if tiles:
            units += [tile._replace(compute_s=head_s / len(tiles)) for tile in tiles]
            head_s = 0.0
        return [*units, UnitTimes(0.0, 0.0, head_s + last["overhead_s"])]

    def _read_at_once(self, split: Split) -> int:
        most_bytes = self._policy.unit_bytes or split.disk_bytes
        return min(most_bytes, split.disk_bytes)

    def _cut(self, layer: UnitTimes, split: Split) -> list[UnitTimes]:
        """A layer's units, each with its part of the arithmetic."""
        streamed = split.streamed_bytes(self._policy.compute)
        count = math.ceil(streamed / (self._policy.unit_bytes or max(1, streamed))) or 1
        return [UnitTimes(*(seconds / count for seconds in layer))] * count

    def _times(self, split: Split) -> UnitTimes:
        policy, hardware = self._policy, self._model.hardware
        read_s = roofline.disk_read_s(
            hardware, split.disk_bytes, unit_bytes=self._read_at_once(split)
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
    return [_Alike(layers=tuple(layers), split=split) for (_, split), layers in groups.items()]
