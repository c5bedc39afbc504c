"""What runs have taught about predictions: one factor a term, learned slowly and within bounds."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Final, Self

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
    """By the name of the term. They are of the profile that was measured at `measured_at`."""

    measured_at: str
    terms: Mapping[str, Correction] = dataclasses.field(default_factory=dict)

    def factor(self, term: str) -> float:
        return self.terms.get(term, Correction()).factor

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


def _bounded(factor: float) -> float:
    return min(MOST, max(LEAST, factor))
