"""Figures for people: amounts with a prefix, and shares."""

from typing import Final

_STEPS: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def step_of(value: float) -> tuple[float, str]:
    """The largest power of a thousand up to `value`, and its prefix."""
    return next(((step, prefix) for step, prefix in _STEPS if value >= step), (1.0, ""))


def amount(value: float) -> str:
    """Like "1.5 G", to be followed by a unit."""
    step, prefix = step_of(value)
    return f"{value / step:.1f} {prefix}" if prefix else f"{value:.0f} "


def spread(share: float) -> str:
    """Half of a range, on either side of the middle."""
    return f"±{share / 2:.0%}"
