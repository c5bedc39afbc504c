"""How many times as long a machine takes in a run as its figures foresee, by what a run tells apart."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from engine.planning.corrections import (
    ATTENTION,
    BETWEEN,
    COMPUTE,
    EXPANSION,
    EXPERTS,
    LAYOUT,
    OVERHEAD,
    PRODUCTS,
    Correction,
    Corrections,
)
from engine.planning.hardware import Hardware
from engine.profiling.probe import Probed, Ran, foreseen

_LEAST: Final = 0.5
_MOST: Final = 3.0
"""A factor outside of these is of something that no factor describes."""

_MOST_OF_EXPERTS: Final = 10.0
"""What an expert costs beside its products is first measured with experts that have next to nothing to do,
whose tokens all lie in a core's cache.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Seconds that were foreseen, by term, and that it took in the mean."""

    foreseen: Mapping[str, float]
    taken_s: float
    attended_s: float
    products_s: float

    @property
    def rest_s(self) -> float:
        return self.taken_s - self.attended_s - self.products_s

    @property
    def foreseen_s(self) -> float:
        return sum(self.foreseen.values())

    @property
    def foreseen_products_s(self) -> float:
        return self.foreseen["gemm_s"] + self.foreseen["head_s"] + self.foreseen["expand_s"]

    @property
    def foreseen_rest_s(self) -> float:
        return self.foreseen["elementwise_s"] + self.foreseen["overhead_s"]


def factors_of(hardware: Hardware, looks: Sequence[Probed], *, on_gpu: bool) -> Mapping[str, float]:
    """By term."""
    many, few = (
        compared(hardware, its)
        for its in zip(*((look.many, look.few) for look in looks), strict=True)
    )
    if on_gpu:
        compute, overhead = of_all(many, few)
        factors = {ATTENTION: compute, COMPUTE: compute, OVERHEAD: overhead / compute}
        return MappingProxyType(factors)
    between, overhead = of_rest(many, few)
    factors = {
        ATTENTION: _bounded(many.attended_s / many.foreseen["attention_s"]),
        PRODUCTS: _bounded(many.products_s / many.foreseen_products_s),
        BETWEEN: between,
        OVERHEAD: overhead / between,
    }
    terms = {term: Correction(factor=factor) for term, factor in factors.items()}
    found = Corrections(measured_on=hardware.measured_on, terms=terms).applied_to(hardware)
    factors[EXPANSION] = turning(found, looks)
    factors[LAYOUT], factors[EXPERTS] = of_experts(found, looks)
    return MappingProxyType(factors)


def compared(hardware: Hardware, looks: Sequence[Ran]) -> Compared:
    """Of one probe, looked at several times."""
    return Compared(
        foreseen=foreseen(hardware, looks[0]),
        taken_s=statistics.fmean(each.taken_s for each in looks),
        attended_s=statistics.fmean(each.attended_s for each in looks),
        products_s=statistics.fmean(each.products_s for each in looks),
    )


def of_all(many: Compared, few: Compared) -> tuple[float, float]:
    """Of what goes with tokens and of what is by the call, where nothing else is told apart."""
    overhead_s = many.foreseen["overhead_s"], few.foreseen["overhead_s"]
    return _two_factors(
        taken_s=(many.taken_s, few.taken_s),
        work_s=(many.foreseen_s - overhead_s[0], few.foreseen_s - overhead_s[1]),
        overhead_s=overhead_s,
    )


def of_rest(many: Compared, few: Compared) -> tuple[float, float]:
    """The same of what is left beside attention and products."""
    return _two_factors(
        taken_s=(many.rest_s, few.rest_s),
        work_s=(many.foreseen["elementwise_s"], few.foreseen["elementwise_s"]),
        overhead_s=(many.foreseen["overhead_s"], few.foreseen["overhead_s"]),
    )


def _two_factors(
    *,
    taken_s: tuple[float, float],
    work_s: tuple[float, float],
    overhead_s: tuple[float, float],
) -> tuple[float, float]:
    """For which runs of many and of few rows take as long as foreseen; within bounds, the many rows'."""
    determinant = work_s[0] * overhead_s[1] - work_s[1] * overhead_s[0]
    overhead = 1.0
    if determinant > 0:
        overhead = _bounded((work_s[0] * taken_s[1] - work_s[1] * taken_s[0]) / determinant)
    return _bounded((taken_s[0] - overhead * overhead_s[0]) / work_s[0]), overhead


def turning(hardware: Hardware, looks: Sequence[Probed]) -> float:
    """Of turning weights: by what products of weights to be turned took longer than those of such as were
    not, in runs that took turns.
    """
    as_is, turned = (
        compared(hardware, its)
        for its in zip(*((look.many, _known(look.turned)) for look in looks), strict=True)
    )
    foreseen_s = turned.foreseen_products_s - as_is.foreseen_products_s
    return _bounded((turned.products_s - as_is.products_s) / foreseen_s)


def of_experts(hardware: Hardware, looks: Sequence[Probed]) -> tuple[float, float]:
    """Of laying out weights for products, which experts' are for each of them, and of what an expert costs
    beside its products.
    """
    runs = [_known(look.sparse) for look in looks]
    sparse = compared(hardware, runs)
    multiplied_s = sparse.foreseen_products_s - sparse.foreseen["expand_s"]
    layout = _bounded((sparse.products_s - multiplied_s) / sparse.foreseen["expand_s"])
    free = dataclasses.replace(hardware, expert_overhead_s=0.0)
    without_s = compared(free, runs).foreseen_rest_s
    experts_s = sparse.foreseen_rest_s - without_s
    if not experts_s:
        return layout, 1.0
    return layout, _bounded((sparse.rest_s - without_s) / experts_s, most=_MOST_OF_EXPERTS)


def _known(ran: Ran | None) -> Ran:
    assert ran is not None, "on a CPU all models run"
    return ran


def _bounded(factor: float, *, most: float = _MOST) -> float:
    return min(most, max(_LEAST, factor))
