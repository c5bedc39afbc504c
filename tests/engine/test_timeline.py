"""The timeline's sums, beside those of a plain list of spans."""

import random
import threading
from collections.abc import Sequence

import pytest

from engine.timeline import Coverage, Event, Timeline, Track

Span = tuple[float, float]


def union_s(spans: Sequence[Span]) -> float:
    """Wall seconds covered, the slow and plain way: whole ticks only."""
    return float(len({tick for start, end in spans for tick in range(int(start), int(end))}))


@pytest.mark.parametrize("seed", range(30))
def test_coverage_counts_each_second_once_in_any_order(seed: int) -> None:
    draw = random.Random(seed)
    spans = [(at, at + draw.randint(0, 9)) for at in (draw.randint(0, 80) for _ in range(30))]
    coverage = Coverage()
    for start, end in spans:
        coverage.add(start, end)
    assert coverage.seconds == union_s(spans)


def test_what_is_settled_stays_and_is_not_counted_again() -> None:
    coverage = Coverage()
    for span in [(0, 2), (4, 6), (8, 12)]:
        coverage.add(*span)
    coverage.settle(10)
    assert coverage.seconds == 8
    coverage.add(1, 5)  # before what is settled ended: too late
    assert coverage.seconds == 8
    coverage.add(5, 9)  # joins the span that was open
    assert coverage.seconds == 8 + 2


def add(timeline: Timeline, track: Track, started_s: float, ended_s: float) -> None:
    timeline.add(track, "", started_s=started_s, ended_s=ended_s, num_bytes=3, flops=5)


def test_bubbles_are_sweep_time_with_neither_compute_nor_the_link_at_work() -> None:
    timeline = Timeline()
    add(timeline, Track.DISK_READ, 0, 4)  # begun before the sweep
    add(timeline, Track.LAYERS, 3, 6)
    add(timeline, Track.ATTENTION, 4, 5)  # within the layers
    add(timeline, Track.WAIT, 6, 8)
    add(timeline, Track.TO_GPU, 7, 8)
    add(timeline, Track.SWEEP, 2, 10)
    add(timeline, Track.DISK_READ, 9, 13)  # under way when the sweep ended, told of later
    assert timeline.idle_s() == {Track.DISK_READ: 3, Track.TO_GPU: 4}
    add(timeline, Track.LAYERS, 20, 21)
    add(timeline, Track.SWEEP, 20, 22)  # between the sweeps nothing is a bubble
    assert timeline.idle_s() == {Track.DISK_READ: 4, Track.TO_GPU: 5}


def test_waits_within_a_span_are_not_of_it_where_it_says_so() -> None:
    timeline = Timeline(keep_events=True)
    add(timeline, Track.WAIT, 0, 1)  # before it
    add(timeline, Track.WAIT, 2, 3)
    add(timeline, Track.WAIT, 5, 8)
    timeline.add(Track.LAYERS, "", started_s=1, ended_s=9, flops=7, but_waits=True)
    add(timeline, Track.SWEEP, 0, 9)
    total = timeline.totals()[Track.LAYERS]
    assert (total.num_spans, total.busy_s, total.covered_s, total.flops) == (1, 4, 4, 7)
    assert timeline.idle_s()[Track.DISK_READ] == 9 - 4
    [layers] = [event for event in timeline.events if event.track is Track.LAYERS]
    assert (layers.started_s, layers.ended_s) == (1, 9)


def test_memory_stays_bounded_over_many_sweeps() -> None:
    timeline = Timeline()
    for sweep in range(50):
        for step in range(20):
            add(timeline, Track.LAYERS, 100 * sweep + 5 * step, 100 * sweep + 5 * step + 1)
        add(timeline, Track.SWEEP, 100 * sweep, 100 * sweep + 99)
    assert timeline.idle_s()[Track.DISK_READ] == 50 * (99 - 20)
    assert timeline.totals()[Track.LAYERS].covered_s == 50 * 20
    assert len(timeline._covered[Track.LAYERS]._spans) <= 2 * 20
    assert timeline.events == []


def test_totals_count_overlapping_spans_each_and_together() -> None:
    timeline = Timeline(keep_events=True)
    add(timeline, Track.DISK_READ, 0, 4)
    add(timeline, Track.DISK_READ, 2, 6)
    before = timeline.totals()[Track.DISK_READ]
    assert (before.num_spans, before.busy_s, before.covered_s) == (2, 8, 6)
    assert (before.num_bytes, before.flops) == (6, 10)
    add(timeline, Track.DISK_READ, 7, 9)
    more = timeline.totals()[Track.DISK_READ].since(before)
    assert (more.num_spans, more.busy_s, more.covered_s, more.num_bytes) == (1, 2, 2, 3)
    assert before.num_spans == 2, "a copy"
    thread = threading.current_thread().name
    assert timeline.events[2] == Event(Track.DISK_READ, "", 7, 9, 3, thread, 5)


def test_a_span_that_raises_is_not_counted() -> None:
    timeline = Timeline()
    with pytest.raises(KeyError), timeline.span(Track.HEAD, "head"):
        raise KeyError
    assert timeline.totals()[Track.HEAD].num_spans == 0
    with timeline.span(Track.HEAD, "head", flops=7):
        assert timeline.totals()[Track.HEAD].num_spans == 0
    assert timeline.totals()[Track.HEAD].flops == 7
