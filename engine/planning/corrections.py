"""What runs have taught about predictions: one factor a term, learned slowly and within bounds."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Final, Self

from engine.planning.hardware import Hardware

DISK, BUS, ATTENTION, COMPUTE = "disk read", "bus", "attention", "compute"
"""The terms: what can be told apart in a run. Compute is all of it but attention, overheads too."""

PRODUCTS, BETWEEN = "products", "between products"
"""Of compute, what a run on a CPU tells apart: products, what makes weights ready for them, and the head;
and all else, overheads too.
"""

EXPANSION, LAYOUT = "expansion", "layout"
OVERHEAD, EXPERTS = "overhead", "experts"
"""Of products, what turns stored weights to another dtype, and what only lays them out; of what lies between
them, what is by the call, and of that what is by the expert. Parts that one run does not tell from the
rest: runs that differ in nothing else do.
"""

LEAST: Final = 0.5
MOST: Final = 2.0
_RATE: Final = 0.25
"""Of the way to what was measured, on a scale of ratios, that one run takes a factor."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """`factor` times as long as the profile alone says; `num_runs` have taught it."""

    factor: float = 1.0
    num_runs: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Corrections:
    """By the name of the term. They are of the profile that was measured on `measured_on`."""

    measured_on: str
    terms: Mapping[str, Correction] = dataclasses.field(default_factory=dict)

    def factor(self, term: str) -> float:
        return self.terms.get(term, Correction()).factor

    def applied_to(self, hardware: Hardware) -> Hardware:
        """The machine as runs have found it."""
        disk, bus = self.factor(DISK), self.factor(BUS)
        attention, compute = self.factor(ATTENTION), self.factor(COMPUTE)
        products, between = compute * self.factor(PRODUCTS), compute * self.factor(BETWEEN)
        turned, laid_out = products * self.factor(EXPANSION), products * self.factor(LAYOUT)
        overhead = between * self.factor(OVERHEAD)
        return dataclasses.replace(
            hardware,
            disk_read=hardware.disk_read.scaled(1 / disk),
            to_gpu_pinned_bytes_per_s=_slower(hardware.to_gpu_pinned_bytes_per_s, bus),
            to_gpu_plain_bytes_per_s=_slower(hardware.to_gpu_plain_bytes_per_s, bus),
            gemm={kind: curve.scaled(1 / products) for kind, curve in hardware.gemm.items()},
            attention_bytes_per_s={
                kind: curve.scaled(1 / attention)
                for kind, curve in hardware.attention_bytes_per_s.items()
            },
            prompt_flops_per_s={
                kind: curve.scaled(1 / attention)
                for kind, curve in hardware.prompt_flops_per_s.items()
            },
            expand_bytes_per_s={
                kind: curve.scaled(1 / (turned if _is_turned(kind) else laid_out))
                for kind, curve in hardware.expand_bytes_per_s.items()
            },
            elementwise_bytes_per_s={
                kind: rate / between for kind, rate in hardware.elementwise_bytes_per_s.items()
            },
            layer_overhead_s=hardware.layer_overhead_s * overhead,
            row_overhead_s=hardware.row_overhead_s * overhead,
            row_layer_overhead_s=hardware.row_layer_overhead_s * attention,
            prompt_layer_overhead_s=hardware.prompt_layer_overhead_s * attention,
            expert_overhead_s=hardware.expert_overhead_s * overhead * self.factor(EXPERTS),
            product_overhead_s=hardware.product_overhead_s * overhead,
            unit_overhead_s=hardware.unit_overhead_s * overhead,
            sweep_overhead_s=hardware.sweep_overhead_s * overhead,
        )

    def learned(self, predicted_s: Mapping[str, float], measured_s: Mapping[str, float]) -> Self:
        """After a run: seconds of each term as they were predicted, these corrections in them, and as
        they turned out. A term that either has none of teaches nothing.
        """
        terms = dict(self.terms)
        for term in predicted_s.keys() & measured_s.keys():
            if predicted_s[term] > 0 and measured_s[term] > 0:
                old = terms.get(term, Correction())
                ratio = measured_s[term] / predicted_s[term]
                terms[term] = Correction(
                    factor=_bounded(old.factor * math.exp(_RATE * math.log(ratio))),
                    num_runs=old.num_runs + 1,
                )
        return dataclasses.replace(self, terms=dict(sorted(terms.items())))


def _is_turned(kind: str) -> bool:
    """Whether "cpu/bfloat16->float32" and the like are of two dtypes."""
    stored, _, computed = kind.partition("/")[2].partition("->")
    return stored != computed


def _bounded(factor: float) -> float:
    return min(MOST, max(LEAST, factor))


def _slower(rate: float | None, factor: float) -> float | None:
    return None if rate is None else rate / factor
