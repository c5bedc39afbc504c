"""How long a call takes on its device: the middle of some trials, and how far they lie apart."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

_LEAST_TRIALS: Final = 3
_MOST_TRIALS: Final = 200
_CALLS: Final = {"cpu": 1, "cuda": 16}
"""In one trial. A GPU is asked for one after the other, as in a run: what asking and being told
takes, hides behind what it does.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Something a second, by the median trial. `spread` is the range of the middle half of the
    trials over their median: 0.1 is ten percent.
    """

    per_s: float
    spread: float


def rate_of(
    run: Callable[[], object], *, amount: float, device: torch.device, seconds: float
) -> Rate:
    """Each call does `amount` of it. Tries for `seconds`, but no fewer than three times; one that
    goes before is not counted.
    """
    timed_s(run, device)
    taken_s: list[float] = []
    ends_s = time.perf_counter() + seconds
    while len(taken_s) < _LEAST_TRIALS or (
        time.perf_counter() < ends_s and len(taken_s) < _MOST_TRIALS
    ):
        taken_s.append(timed_s(run, device))
    return rate_of_trials(taken_s, amount=amount)


def rate_of_trials(taken_s: list[float], *, amount: float) -> Rate:
    """Of at least two trials, each of which did `amount`."""
    low, middle, high = statistics.quantiles(taken_s, n=4, method="inclusive")
    return Rate(per_s=amount / middle, spread=(high - low) / middle)


def timed_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, of as many as a trial has; never 0."""
    num_calls = _CALLS[device.type]
    started_s = time.perf_counter()
    for _ in range(num_calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - started_s, 1e-9) / num_calls
