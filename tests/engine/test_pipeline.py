"""The ring of slots over time: by hand, beside the plain recurrence, and where alike units are skipped."""

import random
from collections.abc import Sequence

import pytest

from engine.planning import pipeline
from engine.planning.pipeline import Stage, UnitTimes, sweep_seconds


def stages_of(*runs: tuple[int, tuple[float, float, float]]) -> list[Stage]:
    return [Stage(UnitTimes(*seconds)) for count, seconds in runs for _ in range(count)]


def swept_s(stages: Sequence[Stage], num_slots: int) -> float:
    return sweep_seconds(stages, num_slots=num_slots, overlap=True)


def followed_s(units: Sequence[UnitTimes], *, num_slots: int, sweeps: int) -> float:
    """The recurrence unit by unit, of the last of so many sweeps."""
    read_end = copy_end = compute_end = before = 0.0
    copied: list[float] = []
    drained: list[float] = []
    for _ in range(sweeps):
        before = compute_end
        for unit in units:
            if unit.is_streamed:
                behind = len(copied) - num_slots
                free = drained[behind] if behind >= 0 else 0.0
                left = copied[behind] if behind >= 0 else 0.0
                read_end = max(read_end, left if unit.copy_s else free) + unit.read_s
                there = read_end
                if unit.copy_s:
                    there = copy_end = max(read_end, copy_end, free) + unit.copy_s
                compute_end = max(compute_end, there)
                copied.append(there)
            compute_end += unit.compute_s
            if unit.is_streamed:
                drained.append(compute_end)
    return compute_end - before


def test_a_streamed_head_stands_where_little_computes_beside_it() -> None:
    """With two slots, what is read ahead of the head is two of its tiles at most."""
    stages = stages_of((4, (0.0, 0.0, 1.0)), (4, (1.0, 0.0, 0.0)))
    assert swept_s(stages, 2) == pytest.approx(4 + 2)
    assert swept_s(stages, 4) == pytest.approx(4.0)
    assert sweep_seconds(stages, num_slots=2, overlap=False) == pytest.approx(8.0)


@pytest.mark.parametrize("num_slots", [2, 3])
def test_no_sweep_is_faster_than_its_lanes_or_slower_than_their_sum(num_slots: int) -> None:
    draw = random.Random(num_slots)
    for _ in range(50):
        stages = stages_of(
            *((1, (_some(draw), _some(draw), _some(draw))) for _ in range(draw.randrange(1, 9)))
        )
        lanes = [sum(lane) for lane in zip(*(stage.unit for stage in stages), strict=True)]
        found = swept_s(stages, num_slots)
        assert max(lanes) - 1e-9 <= found + 1e-9
        assert found <= sum(lanes) + 1e-9


def _some(draw: random.Random) -> float:
    return draw.choice((0.0, draw.random()))


@pytest.mark.parametrize("seed", range(12))
def test_alike_units_that_are_skipped_take_as_long_as_if_they_were_followed(seed: int) -> None:
    draw = random.Random(seed)
    num_slots = draw.randrange(2, 6)
    runs = [(draw.randrange(10, 400), (_some(draw), _some(draw), draw.random())) for _ in range(3)]
    stages = stages_of(*runs)
    expected_s = followed_s([stage.unit for stage in stages], num_slots=num_slots, sweeps=4)
    assert swept_s(stages, num_slots) == pytest.approx(expected_s, rel=1e-3)


def test_a_stage_of_units_is_its_units_where_one_forward_goes_through() -> None:
    unit = UnitTimes(0.3, 0.1, 0.2)
    cut = [Stage(unit, num_units=5)] * 7
    assert swept_s(cut, 3) == pytest.approx(swept_s([Stage(unit)] * 35, 3))


def test_what_forwards_hold_is_free_when_the_last_of_them_is_through() -> None:
    """Layers of two units, through which four forwards go in 1 s each: 8 s a layer. In three slots the
    second unit of the next one is read from 7 s on, and asked for at 9 s.
    """

    def held(read_s: float) -> list[Stage]:
        return [Stage(UnitTimes(read_s, 0.0, 4.0), num_units=2, num_forwards=4)] * 10

    assert swept_s(held(2.0), 3) == pytest.approx(80.0)
    assert swept_s(held(3.0), 3) == pytest.approx(90.0)
    assert swept_s(held(3.0), 4) == pytest.approx(80.0)
    along = [Stage(UnitTimes(3.0, 0.0, 4.0), num_units=2)] * 10
    assert swept_s(along, 3) == pytest.approx(80.0)


def test_many_units_are_not_followed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = []
    follow = pipeline._Ring._follow

    def count_and_follow(ring: pipeline._Ring, stage: Stage, count: int) -> None:
        followed.append(count * stage.num_units)
        follow(ring, stage, count)

    monkeypatch.setattr(pipeline._Ring, "_follow", count_and_follow)
    layers = [Stage(UnitTimes(0.01, 0.01, 0.011), num_units=200)] * 80
    assert swept_s(layers, 3) == pytest.approx(80 * 200 * 0.011, rel=1e-3)
    assert sum(followed) < 2000
