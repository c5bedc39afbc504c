"""Every point of the contract's checklist has a test named after it, or stands in a list here."""

import re
from pathlib import Path

_TESTS = Path(__file__).parents[1]
_NAME = re.compile(r"^(?:async )?def test_(\d{3})_", re.MULTILINE)
NUM_POINTS = 136

NOT_BUILT_YET = {
    136: "the client's own resource tests, which ask for a server with fixed ids",
}
NEVER_HAPPENS = {
    95: "the engine runs in the worker's process: a line has no timeout that could end it alone",
}


def named_points() -> set[int]:
    return {
        int(number)
        for path in _TESTS.rglob("test_*.py")
        for number in _NAME.findall(path.read_text())
    }


def test_every_point_is_tested_or_listed() -> None:
    listed = set(NOT_BUILT_YET) | set(NEVER_HAPPENS)
    points = set(range(1, NUM_POINTS + 1))
    assert sorted(points - named_points() - listed) == [], "neither tested nor listed"
    assert sorted(named_points() & listed) == [], "tested: take it off the list"
    assert sorted((named_points() | listed) - points) == [], "no such point"
