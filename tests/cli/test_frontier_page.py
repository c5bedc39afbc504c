"""The frontier's page: whole by itself, every point where its figures say, words that are safe."""

import itertools
import re
from typing import Final
from xml.etree import ElementTree as ET

import pytest

from cli.frontier_page import Mark, frontier_page

FRONTIER: Final = [
    Mark(label=f"{rows} rows", tokens_per_s=300 * rows / (rows + 80), latency_s=20 + rows / 3)
    for rows in (1, 4, 16, 64, 256, 1024)
]
OTHERS: Final = [
    Mark(label="FlexGen <published>", tokens_per_s=25, latency_s=900, detail='"a & b"'),
    Mark(label="all on the GPU", tokens_per_s=3, latency_s=2),
]


def _drawing(page: str) -> ET.Element:
    found = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    assert found is not None
    return ET.fromstring(found[0])


def test_the_page_stands_alone_and_its_words_are_escaped() -> None:
    page = frontier_page("OPT <30B>", "2 & 2", FRONTIER, OTHERS)
    assert "http" not in page
    assert "<script" not in page
    assert "OPT &lt;30B&gt;" in page
    assert "FlexGen &lt;published&gt;" in page
    assert "FlexGen <published>" not in page
    assert page.count("<tr>") == 1 + len(FRONTIER) + len(OTHERS)


def test_points_lie_within_the_frame_in_the_order_of_their_figures() -> None:
    drawing = _drawing(frontier_page("t", "s", FRONTIER, OTHERS))
    (frame,) = drawing.findall("rect[@class='frame']")
    left, top = float(frame.get("x", "")), float(frame.get("y", ""))
    right = left + float(frame.get("width", ""))
    bottom = top + float(frame.get("height", ""))
    dots = [(float(it.get("cx", "")), float(it.get("cy", ""))) for it in drawing.iter("circle")]
    assert len(dots) == len(FRONTIER)
    for (x, y), (next_x, next_y) in itertools.pairwise(dots):
        assert left < x < next_x < right
        assert top < next_y < y < bottom
    moves = [re.match(r"M([\d.]+)", it.get("d", "")) for it in drawing.iter("path")]
    places = [float(move[1]) for move in moves if move]
    assert left < places[1] < dots[0][0] < dots[-1][0] < places[0] < right


@pytest.mark.parametrize("span", [1.0, 3.0, 50.0, 1e4, 1e7])
def test_axes_have_some_ticks_and_not_too_many_with_units(span: float) -> None:
    marks = [
        Mark(label="a", tokens_per_s=0.7, latency_s=0.4),
        Mark(label="b", tokens_per_s=0.7 * span, latency_s=0.4 * span),
    ]
    texts = list(_drawing(frontier_page("t", "s", marks, [])).iter("text"))
    across = [it.text or "" for it in texts if it.get("text-anchor") == "middle"][:-2]
    up = [it.text for it in texts if it.get("text-anchor") == "end"]
    assert 1 <= len(across) <= 12
    assert 1 <= len(up) <= 12
    assert all(re.fullmatch(r"\d+ (ms|s|min|h|d)", text) for text in across)
