"""The call log of the real engine: a witness of what it was asked and of every sweep."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.sweep.call_log import CallLog
from tests.support.policies import streaming
from tests.support.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("called"), "llama")


def load(folder: Path, log: Path, **policy: Any) -> Engine:
    budgets = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=folder / "spill")
    return Engine.load(folder, budgets=budgets, policy=streaming(1.0, **policy), call_log=log)


def prompt(key: str, *, num_tokens: int = 5, max_tokens: int = 3) -> Prompt:
    token_ids = tuple(2 + (len(key) + at) % 200 for at in range(num_tokens))
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    return Prompt(key=key, token_ids=token_ids, sampling=sampling)


def read(log: Path, *events: str) -> list[dict[str, Any]]:
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    return [call for call in calls if not events or call["event"] in events]


def test_a_rows_life_can_be_read_off_it(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "calls.jsonl"
    with load(folder, log, sweep_tokens=4) as engine:
        engine.submit(prompt("a"))
        engine.submit(prompt("gone"))
        engine.cancel("gone")
        while engine.num_rows:
            engine.sweep()
    calls = read(log)
    order = [call["event"] for call in calls if call["event"] != "sweep"]
    assert order == ["load", "submit", "submit", "cancel", "finish", "close"]
    (submit, _) = read(log, "submit")
    assert (submit["key"], submit["prompt_tokens"], submit["max_tokens"]) == ("a", 5, 3)
    sweeps = read(log, "sweep")
    assert [sweep["sweep"] for sweep in sweeps] == [1, 2, 3, 4]
    assert [sweep["rows"] for sweep in sweeps] == [
        [{"key": "a", "sample": 0, "position": 0, "tokens": 4, "sampled": False}],
        [{"key": "a", "sample": 0, "position": 4, "tokens": 1, "sampled": True}],
        [{"key": "a", "sample": 0, "position": 5, "tokens": 1, "sampled": True}],
        [{"key": "a", "sample": 0, "position": 6, "tokens": 1, "sampled": True}],
    ]
    (finish,) = read(log, "finish")
    assert (finish["key"], finish["reason"], finish["tokens"]) == ("a", "length", 3)
    assert [call["at_s"] for call in calls] == sorted(call["at_s"] for call in calls)
    assert all(call["wall_s"] > 1e9 for call in calls)


def test_a_preempted_row_is_named_and_computed_again(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    with load(folder, log, kv_bytes=6 * 16 * 1024) as engine:
        rows = [prompt(key, max_tokens=60) for key in ("a", "bb")]
        assert len(list(engine.generate(rows))) == 2
        num_preempted = engine.report().preempted_rows
    preempted = read(log, "preempt")
    assert num_preempted == len(preempted) > 0
    assert preempted[0]["key"] == "bb"
    again = [row for sweep in read(log, "sweep") for row in sweep["rows"] if row["key"] == "bb"]
    assert sum(row["position"] == 0 for row in again) == 1 + len(preempted)
    assert sum(row["tokens"] for row in again) == 64 + sum(call["tokens"] for call in preempted)


def test_a_sweep_that_raised_is_told_apart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "calls.jsonl"
    with load(folder, log) as engine:
        engine.submit(prompt("a"))
        with monkeypatch.context() as broken:
            broken.setattr("engine.sweep.executor.sample", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.sweep()
        engine.sweep()
        assert engine.report().num_sweeps == 1
    (raised,) = read(log, "raised")
    assert (raised["sweep"], raised["error"]) == (1, "ZeroDivisionError")
    first, second = read(log, "sweep")
    assert first["rows"] == second["rows"]
    assert (first["sweep"], second["sweep"]) == (1, 2)


_KILLED = """
import os, signal, sys
from pathlib import Path
from engine.sweep.call_log import CallLog
log = CallLog(Path(sys.argv[1]))
log.submit("a", prompt_tokens=1, max_tokens=2)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_outlives_a_kill_and_grows_over_processes(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    for _ in range(2):
        killed = subprocess.run(
            [sys.executable, "-c", _KILLED, str(log)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": "."},
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
    assert [call["event"] for call in read(log)] == ["load", "submit"] * 2


def test_a_full_disk_ends_the_log_and_not_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "calls.jsonl"
    log = CallLog(path)

    def write(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("engine.sweep.call_log.os.write", write)
        with pytest.warns(match="the call log ends at 'cancel'"):
            log.cancel("a")
    log.cancel("b")
    log.close()
    assert [call["event"] for call in read(path)] == ["load"]
