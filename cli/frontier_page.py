"""Throughput against completion latency as one self-contained HTML page; knows points, no planner."""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Final

_WIDTH: Final = 1020
_HEIGHT: Final = 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 350, 24, 64
_TICK_PX: Final = 6
_LABEL_PX: Final = 17
"""Between labels at the right edge."""

_COLOURS: Final = ("#c0392b", "#8e44ad", "#d68910", "#16a085", "#7f8c8d")

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3_600, 86_400
_FEW_DURATIONS_S: Final = (
    *(0.001, 0.01, 0.1, 1, 10),
    *(_MINUTE_S, 10 * _MINUTE_S, _HOUR_S, 10 * _HOUR_S, 3 * _DAY_S, 30 * _DAY_S),
)
_DURATIONS_S: Final = (
    *(step * 10.0**power for power in (-3, -2, -1, 0) for step in (1, 2, 5)),
    *(10, 20, 30),
    *(minutes * _MINUTE_S for minutes in (1, 2, 5, 10, 20, 30)),
    *(hours * _HOUR_S for hours in (1, 2, 5, 12)),
    *(days * _DAY_S for days in (1, 2, 5, 10, 20, 50, 100)),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One policy: what it generates a second, and how long a request takes from its start."""

    label: str
    tokens_per_s: float
    latency_s: float
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """A logarithmic scale of values over pixels; whole powers of ten lie within it."""

    low: float
    high: float
    first_px: float
    last_px: float

    @classmethod
    def over(cls, values: Sequence[float], first_px: float, last_px: float) -> "_Axis":
        """With a tenth of a decade of air at both ends, and half a decade in all at least."""
        low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1
        air = max(0.0, 0.5 - (high - low)) / 2
        return cls(low=low - air, high=high + air, first_px=first_px, last_px=last_px)

    def px(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.first_px + share * (self.last_px - self.first_px)

    def within(self, ticks: Sequence[float]) -> list[float]:
        return [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]

    def round_values(self) -> list[float]:
        """1, 2 and 5 of each power of ten; powers alone where those would be too many."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        steps = (1, 2, 5) if self.high - self.low < 3 else (1,)
        return self.within([step * 10.0**power for power in powers for step in steps])

    def durations(self) -> list[float]:
        """Seconds that people have round words for; few where the axis is long."""
        return self.within(_DURATIONS_S if self.high - self.low < 3 else _FEW_DURATIONS_S)


def frontier_page(
    title: str, subtitle: str, frontier: Sequence[Mark], others: Sequence[Mark]
) -> str:
    """`frontier` in order of latency, drawn as a line; `others` as marks with their names.

    At least one point in all; every figure is above 0.
    """
    every = [*frontier, *others]
    across = _Axis.over([mark.latency_s for mark in every], _LEFT, _WIDTH - _RIGHT)
    up = _Axis.over([mark.tokens_per_s for mark in every], _HEIGHT - _BOTTOM, _TOP)
    drawn = [
        *_grid(across, up),
        *_line(frontier, across, up),
        *_marks(others, across, up),
        *_legend(others),
    ]
    return _PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        width=_WIDTH,
        height=_HEIGHT,
        drawing="\n".join(drawn),
        rows="\n".join(_row(mark) for mark in every),
    )


def _grid(across: _Axis, up: _Axis) -> list[str]:
    bottom, left = _HEIGHT - _BOTTOM, _LEFT
    drawn = []
    for tick in across.durations():
        x = across.px(tick)
        drawn += [
            f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom + _TICK_PX}"/>',
            (
                f'<text class="tick" x="{x:.1f}" y="{bottom + 22}" text-anchor="middle">'
                f"{_duration(tick)}</text>"
            ),
        ]
    for tick in up.round_values():
        y = up.px(tick)
        drawn += [
            f'<line class="grid" x1="{left - _TICK_PX}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>',
            f'<text class="tick" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>',
        ]
    middle = (left + _WIDTH - _RIGHT) / 2
    return [
        *drawn,
        (
            f'<rect class="frame" x="{left}" y="{_TOP}" width="{_WIDTH - _RIGHT - left}" '
            f'height="{bottom - _TOP}"/>'
        ),
        (
            f'<text class="axis" x="{middle}" y="{_HEIGHT - 16}" text-anchor="middle">'
            "time to complete one request in steady state (log scale)</text>"
        ),
        (
            f'<text class="axis" transform="translate(22 {(_TOP + bottom) / 2}) rotate(-90)" '
            'text-anchor="middle">generated tokens a second (log scale)</text>'
        ),
    ]


def _line(frontier: Sequence[Mark], across: _Axis, up: _Axis) -> list[str]:
    places = [(across.px(mark.latency_s), up.px(mark.tokens_per_s)) for mark in frontier]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [
        f'<circle class="ours" cx="{x:.1f}" cy="{y:.1f}" r="4">{_tip(mark)}</circle>'
        for mark, (x, y) in zip(frontier, places, strict=True)
    ]
    return [f'<polyline class="ours" points="{path}"/>', *dots]


def _marks(others: Sequence[Mark], across: _Axis, up: _Axis) -> list[str]:
    return [
        f'<path d="M{x:.1f} {y - 8:.1f} L{x + 8:.1f} {y:.1f} L{x:.1f} {y + 8:.1f} '
        f'L{x - 8:.1f} {y:.1f} Z" fill="{_colour(index)}" stroke="#fff">{_tip(mark)}</path>'
        for index, mark in enumerate(others)
        for x, y in [(across.px(mark.latency_s), up.px(mark.tokens_per_s))]
    ]


def _legend(others: Sequence[Mark]) -> list[str]:
    x = _WIDTH - _RIGHT + 18
    entries = [("Freight: the frontier", "#1f618d")]
    entries += [(mark.label, _colour(index)) for index, mark in enumerate(others)]
    return [
        part
        for index, (label, colour) in enumerate(entries)
        for y in [_TOP + 14 + index * 1.4 * _LABEL_PX]
        for part in (
            f'<rect x="{x}" y="{y - 10:.1f}" width="12" height="12" fill="{colour}"/>',
            f'<text class="tick" x="{x + 18}" y="{y:.1f}">{html.escape(label)}</text>',
        )
    ]


def _row(mark: Mark) -> str:
    return (
        f"<tr><td>{html.escape(mark.label)}</td><td>{mark.tokens_per_s:.3g}</td>"
        f"<td>{_duration(mark.latency_s)}</td><td>{html.escape(mark.detail)}</td></tr>"
    )


def _tip(mark: Mark) -> str:
    text = f"{mark.label}: {mark.tokens_per_s:.3g} tokens/s, {_duration(mark.latency_s)}"
    return f"<title>{html.escape(text + (f'; {mark.detail}' if mark.detail else ''))}</title>"


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _duration(seconds: float) -> str:
    for size, unit in ((_DAY_S, "d"), (_HOUR_S, "h"), (_MINUTE_S, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2833; margin: 24px auto; max-width: 1060px;
  padding: 0 16px; }}
h1 {{ font-size: 20px; margin: 0; }}
p {{ margin: 4px 0 16px; color: #566573; }}
svg {{ width: 100%; height: auto; background: #fff; }}
svg .grid {{ stroke: #e5e8e8; }}
svg .frame {{ fill: none; stroke: #808b96; }}
svg .tick {{ font: 13px system-ui, sans-serif; fill: #2c3e50; }}
svg .axis {{ font: 14px system-ui, sans-serif; fill: #1c2833; }}
svg polyline.ours {{ fill: none; stroke: #1f618d; stroke-width: 2.5; }}
svg circle.ours {{ fill: #1f618d; stroke: #fff; }}
table {{ border-collapse: collapse; margin-top: 16px; width: 100%; }}
th, td {{ text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid #e5e8e8;
  vertical-align: top; }}
td:nth-child(2), td:nth-child(3) {{ text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{subtitle}</p>
<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">
{drawing}
</svg>
<table>
<thead><tr><th>policy</th><th>tokens/s</th><th>latency</th><th>what it is</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""
