"""From settings to an engine: what they say about its trace and its call log is done."""

import json
from pathlib import Path

import pytest

from engine.config import Prompt, Sampling
from engine.sweep.report import Report
from jobs.settings import Settings
from tests.support.tiny_models import write_tiny_model
from worker.load import load


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        state_dir=tmp_path / "state",
        model=str(write_tiny_model(tmp_path / "model", "llama")),
        gpu_memory_bytes=0,
        host_memory_bytes=10**9,
        disk_space_bytes=10**8,
        trace_file=tmp_path / "logs" / "trace.json",
        call_log=tmp_path / "logs" / "calls.jsonl",
    )


def test_trace_and_call_log_are_written_where_the_settings_say(settings: Settings) -> None:
    assert settings.trace_file is not None
    assert settings.call_log is not None
    engine = load(settings).engine
    engine.submit(Prompt(key="a", token_ids=(5, 6), sampling=Sampling(max_tokens=1)))
    assert len(engine.sweep()) == 1
    engine.close()
    events = json.loads(settings.trace_file.read_text())
    assert {"layers", "head", "sampling", "sweep"} <= {event.get("cat") for event in events}
    calls = [json.loads(line)["event"] for line in settings.call_log.read_text().splitlines()]
    assert calls == ["load", "submit", "sweep", "finish", "close"]


def test_a_model_that_fits_streams_nothing_and_has_no_ceiling_of_the_disk(
    settings: Settings,
) -> None:
    engine = load(settings).engine
    engine.submit(Prompt(key="a", token_ids=(5, 6), sampling=Sampling(max_tokens=1)))
    engine.sweep()
    report = engine.report()
    assert isinstance(report, Report)
    engine.close()
    assert report.ceilings is not None
    assert report.ceilings.disk_read_bytes_per_s is None
    assert report.ceilings.gemm_flops_per_s > 0
    assert report.ceilings.memory_bytes_per_s > 0
    assert "disk read" not in {line.name for line in report.lines()}
