"""The trace file: what viewers accept of it, whole or cut off, and what a streaming run shows."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.sweep.trace import ChromeTrace
from engine.timeline import Timeline, Track
from tests.support.policies import streaming
from tests.support.tiny_models import NUM_LAYERS, write_tiny_model


def read_whole(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())
    return events


def read_cut_off(path: Path) -> list[dict[str, Any]]:
    """As viewers do: the closing bracket may be missing."""
    events: list[dict[str, Any]] = json.loads(path.read_text().rstrip().removesuffix(",") + "]")
    return events


def spans_of(events: list[dict[str, Any]], track: Track) -> list[tuple[float, float]]:
    found = [event for event in events if event["ph"] == "X" and event["cat"] == track]
    return [(event["ts"], event["ts"] + event["dur"]) for event in found]


def overlap_us(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in one for b in other)


def test_spans_become_events_on_a_row_a_thread_and_track(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace.json"
    timeline = Timeline(sink=ChromeTrace(path))
    origin = timeline._sink._origin_s  # type: ignore[union-attr]  # the times are relative to it
    timeline.add(
        Track.DISK_READ, "layers.3", started_s=origin + 1, ended_s=origin + 1.5, num_bytes=9
    )

    def from_elsewhere() -> None:
        timeline.add(Track.DISK_READ, "layers.4", started_s=origin, ended_s=origin + 2)

    elsewhere = threading.Thread(target=from_elsewhere, name="elsewhere")
    elsewhere.start()
    elsewhere.join()
    timeline.add(Track.LAYERS, "layer 3", started_s=origin, ended_s=origin + 1, flops=8)
    timeline.count("rows in the block", 5)
    timeline.close()
    events = read_whole(path)
    spans = [event for event in events if event["ph"] == "X"]
    assert (spans[0]["name"], spans[0]["cat"]) == ("layers.3", "disk read")
    assert (spans[0]["ts"], spans[0]["dur"]) == (pytest.approx(1e6), pytest.approx(5e5))
    assert [span["args"] for span in spans] == [{"bytes": 9}, {}, {"flops": 8}]
    names = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    thread = threading.current_thread().name
    expected = [f"disk read ({thread})", "disk read (elsewhere)", f"layers ({thread})"]
    assert [names[span["tid"]] for span in spans] == expected
    (count,) = [event for event in events if event["ph"] == "C"]
    assert count["args"] == {"rows in the block": 5}


def test_a_file_that_was_cut_off_at_any_flush_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = ChromeTrace(path)
    timeline = Timeline(sink=trace)
    for number in range(3000):
        timeline.add(Track.HEAD, f"head {number}", started_s=number, ended_s=number + 1)
    by_itself = len(read_cut_off(path))
    assert 0 < by_itself < 3000, "it is written as it comes, in pieces"
    timeline.flush()
    assert len(spans_of(read_cut_off(path), Track.HEAD)) == 3000
    timeline.close()
    assert len(spans_of(read_whole(path), Track.HEAD)) == 3000


def test_a_full_trace_says_so_and_grows_no_further(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    timeline = Timeline(sink=ChromeTrace(path, max_bytes=5000))
    for number in range(100):
        timeline.add(Track.HEAD, "head", started_s=number, ended_s=number + 1)
    timeline.close()
    events = read_whole(path)
    assert "the trace is full at 5,000 bytes" in events[-1]["name"]
    assert len(spans_of(events, Track.HEAD)) < 100
    assert path.stat().st_size < 5500
    assert timeline.totals()[Track.HEAD].num_spans == 100


def test_a_full_disk_ends_the_trace_and_not_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeline = Timeline(sink=ChromeTrace(tmp_path / "trace.json"))
    timeline.add(Track.HEAD, "head", started_s=0, ended_s=1)

    def write(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("engine.sweep.trace.os.write", write)
        with pytest.warns(match=r"ends early.*No space left"):
            timeline.flush()
    timeline.add(Track.HEAD, "head", started_s=1, ended_s=2)
    timeline.flush()
    timeline.close()
    assert timeline.totals()[Track.HEAD].num_spans == 2


def test_a_streaming_runs_trace_shows_reads_beside_layers(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    path = tmp_path / "trace.json"
    budgets = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=tmp_path / "spill")
    prompts = [
        Prompt(
            key=str(number),
            token_ids=tuple(2 + (number + at) % 200 for at in range(60)),
            sampling=Sampling(max_tokens=6, ignore_eos=True),
        )
        for number in range(6)
    ]
    timeline = Timeline(sink=ChromeTrace(path))
    policy = streaming(0.0, micro_batch_tokens=16)
    with Engine.load(folder, budgets=budgets, policy=policy, timeline=timeline) as engine:
        assert len(list(engine.generate(prompts))) == 6
        report = engine.report()
    events = read_whole(path)
    reads, layers = spans_of(events, Track.DISK_READ), spans_of(events, Track.LAYERS)
    assert len(spans_of(events, Track.SWEEP)) == report.num_sweeps
    assert len(layers) >= report.num_sweeps * NUM_LAYERS
    assert len(spans_of(events, Track.ATTENTION)) == len(layers)
    assert len(reads) >= report.num_sweeps * NUM_LAYERS
    assert overlap_us(reads, layers) > 0, "coming layers are read while others compute"
    rows = [event["args"] for event in events if event["name"] == "rows in the block"]
    assert len(rows) == report.num_sweeps
    pages = [event["args"] for event in events if event["name"] == "pages in use"]
    assert pages[-1] == {"pages in use": 0}
    assert max(page["pages in use"] for page in pages) > 0
