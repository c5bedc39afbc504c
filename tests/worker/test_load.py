"""From settings to an engine: what they say of its trace, call log and dtype is done."""

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import worker.load
from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.errors import ComputeDtypeError
from engine.memory.measure import measure_budgets
from engine.planning.corrections import Corrections
from engine.planning.policy import Split, Tier, needs_reload
from engine.planning.records import read_record, write_record
from engine.profiling import saved
from engine.profiling.measure import QUICK
from engine.profiling.measurement import Measured
from engine.sweep.report import Report
from jobs.line_group import LineGroup, WaitingBatch
from jobs.settings import ComputeDtype, Settings
from tests.support.profiles import MEASURED, hardware_here
from tests.support.tiny_models import write_tiny_model
from worker.load import load
from worker.model import Loaded
from worker.planning import Decision, Planning
from worker.queue_shape import QueueShape
from worker.replanner import Replanner


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    profile = tmp_path / "profile.json"
    profile.write_text(hardware_here(tmp_path).to_json())
    return Settings(
        state_dir=tmp_path / "state",
        model=str(write_tiny_model(tmp_path / "model", "llama")),
        gpu_memory_bytes=0,
        host_memory_bytes=10**9,
        disk_space_bytes=10**8,
        trace_file=tmp_path / "logs" / "trace.json",
        call_log=tmp_path / "logs" / "calls.jsonl",
        profile=profile,
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


def _waits(
    num_lines: int, *, prompt_tokens: int, limit_tokens: int, shared_tokens: int = 0
) -> WaitingBatch:
    group = LineGroup(
        num_lines=num_lines,
        prompt_tokens=num_lines * prompt_tokens,
        shared_tokens=num_lines * shared_tokens,
        limit_tokens=num_lines * limit_tokens,
    )
    return WaitingBatch(batch_id="b", num_open=num_lines, groups=(group,), outputs=())


def _engine(loaded: Loaded) -> Engine:
    assert isinstance(loaded.engine, Engine)
    return loaded.engine


def test_the_engine_is_planned_for_what_waits(settings: Settings) -> None:
    with _engine(load(settings, [_waits(9, prompt_tokens=20, limit_tokens=20)])) as engine:
        assert engine.block_rows <= 9
        assert "tokens/s predicted" in engine.policy.reason
        # Whatever waits now: the longest row that the model allows has room.
        assert engine.max_context_tokens == 512


def test_a_machine_nobody_has_measured_is_measured_quickly_at_the_first_start_alone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[object] = []

    def pretend(spill_dir: Path, *, effort: object, progress: object) -> Measured:
        spent.append(effort)
        return MEASURED

    monkeypatch.setattr(saved, "measure", pretend)
    own = dataclasses.replace(settings, profile=None)
    for _ in range(2):
        load(own).engine.close()
    assert spent == [QUICK]
    assert own.profile_file.exists()


def test_a_policys_file_is_carried_out_as_it_is(settings: Settings, tmp_path: Path) -> None:
    with _engine(load(settings)) as engine:
        policy = dataclasses.replace(engine.policy, block_rows=3, reason="by hand")
    write_record(tmp_path / "policy.json", policy)
    by_hand = dataclasses.replace(settings, policy=tmp_path / "policy.json", block_rows=50)
    with _engine(load(by_hand, [_waits(900, prompt_tokens=9, limit_tokens=9)])) as engine:
        assert engine.policy == policy


def test_a_queue_that_moves_changes_the_block_under_the_loaded_weights(settings: Settings) -> None:
    loaded = load(settings, [_waits(4, prompt_tokens=20, limit_tokens=20)])
    assert loaded.replanner is not None
    with _engine(loaded) as engine:
        before = engine.policy
        assert not loaded.replanner.consider([_waits(5, prompt_tokens=20, limit_tokens=20)])
        assert engine.policy is before
        assert not loaded.replanner.consider([_waits(400, prompt_tokens=20, limit_tokens=20)])
        assert engine.block_rows > before.block_rows
        assert needs_reload(before, engine.policy) == ()
        engine.submit(Prompt(key="a", token_ids=(5, 6), sampling=Sampling(max_tokens=1)))
        assert len(engine.sweep()) == 1


def test_a_closed_engines_weights_are_gone_before_room_for_the_next_is_measured(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though who loads anew still holds the last one, and so do handlers of signals."""
    num_models: list[int] = []

    def counting(**options: Any) -> Budgets:
        kinds = [type(each) for each in gc.get_objects()]
        num_models.append(sum(issubclass(kind, PreTrainedModel) for kind in kinds))
        return measure_budgets(**options)

    monkeypatch.setattr(worker.load, "measure_budgets", counting)
    first = load(settings)
    first.engine.close()
    load(settings).engine.close()
    assert num_models[1] == num_models[0]
    assert first.engine.block_rows


def test_rows_too_long_for_what_is_loaded_are_worth_a_load(settings: Settings) -> None:
    with _engine(load(settings)) as engine:
        page = Split.on(Tier.CPU, 128 * engine.basis.shape.kv_bytes_per_token)
        short = dataclasses.replace(engine.policy, kv=page)
    write_record(settings.state_dir / "short.json", short)
    by_hand = dataclasses.replace(settings, policy=settings.state_dir / "short.json")
    with _engine(load(by_hand)) as engine:
        assert engine.max_context_tokens == 128
        replanner = Replanner(
            engine,
            Planning.open(settings),
            decision=Decision(policy=short),
            queue=QueueShape.of([]),
            load_s=1e6,
        )
        assert not replanner.consider([_waits(900, prompt_tokens=20, limit_tokens=20)])
        assert replanner.consider([_waits(900, prompt_tokens=100, limit_tokens=200)])


def test_a_busy_period_is_set_beside_its_prediction_and_teaches_the_next_plan(
    settings: Settings,
) -> None:
    waiting = [_waits(12, prompt_tokens=4, limit_tokens=40)]
    loaded = load(settings, waiting)
    assert loaded.replanner is not None
    with _engine(loaded) as engine:
        sampling = Sampling(max_tokens=40, ignore_eos=True)
        prompts = [
            Prompt(key=str(row), token_ids=(5, 6, 7, row), sampling=sampling) for row in range(12)
        ]
        assert len(list(engine.generate(prompts))) == 12
        told = loaded.replanner.settle(engine.report())
    assert told is not None
    assert told["terms"]["products"]["predicted_s"] > 0
    assert told["terms"]["products"]["measured_s"] > 0
    assert told["tokens_per_s"]["measured"] > 0
    assert told["is_steady"]
    factors = read_record(Corrections, settings.corrections_file).terms
    assert 0.5 <= factors["products"].factor <= 2
    assert told["corrections"]["products"] == round(factors["products"].factor, 4)
    again = Planning.open(settings)
    assert again.corrections.terms == factors
    assert again.hardware.layer_overhead_s == 6e-4 * factors["between products"].factor


def test_what_it_computes_in_is_the_settings_own_or_refused(settings: Settings) -> None:
    engine = _engine(load(dataclasses.replace(settings, compute_dtype=ComputeDtype.BFLOAT16)))
    engine.submit(Prompt(key="a", token_ids=(5, 6), sampling=Sampling(max_tokens=1)))
    engine.sweep()
    report = engine.report()
    engine.close()
    assert engine.policy.compute_dtype == "bfloat16"
    assert report.ceilings is not None
    assert report.ceilings.gemm_flops_per_s > 0
    with pytest.raises(ComputeDtypeError, match="float16 is computed in on a GPU only"):
        load(dataclasses.replace(settings, compute_dtype=ComputeDtype.FLOAT16))
