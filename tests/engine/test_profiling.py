"""A profile: everything is measured once, kept as it was, and measured anew when it holds no more."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.errors import EngineError, HardwareError
from engine.foresight import foresee
from engine.memory.stopwatch import Rate
from engine.planning.hardware import MOST_OTHERS_SHARE, Hardware, RateCurve
from engine.planning.policy import Policy, Split, Tier
from engine.profiling import saved
from engine.profiling.description import hardware_of
from engine.profiling.factors import Compared, of_all, of_experts, of_rest, turning
from engine.profiling.looks import mean_measurements, mean_overheads
from engine.profiling.measure import Effort, measure
from engine.profiling.measurement import Figure, Measured, Measurement
from engine.profiling.others import OthersWatch
from engine.profiling.overheads import Overheads, fit_overheads, fit_prompts
from engine.profiling.probe import Probe, Probed, Ran, foreseen
from engine.profiling.saved import measured_or_saved, read_hardware
from engine.profiling.seeded import write_model
from tests.support.profiles import MEASURED, hardware_here

LEAST = Effort(
    looks=2,
    seconds=0.0,
    overhead_s=0.0,
    gemm_rows=(1, 4),
    expanding_rows=(1, 4),
    heads_per_key=(1, 4),
    request_bytes=(2**16, 2**18),
    file_bytes=2**20,
    scanned_bytes=2**20,
    prompt_tokens=(8, 16),
    probe=Probe(
        layers=1, hidden=64, rows=3, rows_a_sweep=2, prompt_tokens=8, output_tokens=3, rounds=1
    ),
)


def test_all_that_a_plan_asks_is_measured_and_told_step_by_step(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    measured = measure(tmp_path / "spill", effort=LEAST, progress=lambda *step: told.append(step))
    for figure in (Figure.DISK_READ, Figure.DISK_WRITE):
        assert [at for at, _ in measured.curve(figure)] == [2**16, 2**18]
    assert measured.kinds(Figure.GEMM)[:2] == ("cpu/float32", "cpu/bfloat16")
    assert [rows for rows, _ in measured.curve(Figure.GEMM, "cpu/bfloat16")] == [1, 4]
    hardware = hardware_of(measured, {"cpu": "this one"})
    assert hardware.memory_bytes_per_s > 0
    for dtype in ("float32", "bfloat16"):
        found = measured.curve(Figure.ATTENTION, f"cpu/{dtype}")
        assert [heads for heads, _ in found] == [1, 4]
        assert hardware.attention_rate("cpu", dtype, 2) > 0
    assert 0 <= hardware.others_share <= 1
    assert hardware.expand_rate("cpu", "bfloat16", "float32", 2) > 0
    assert hardware.prompt_rate("cpu", "float32", 12) > 0
    assert [at for at, _ in measured.curve(Figure.PROMPTS, "cpu/bfloat16")] == [8, 16]
    assert set(measured.factors) == {
        "attention",
        "products",
        "between products",
        "overhead",
        "expansion",
        "layout",
        "experts",
    }
    assert hardware.gemm_flops_per_s("cpu", "float32", 2) > 0
    assert hardware.elementwise_rate("cpu", "bfloat16") > 0
    assert hardware.disk_read.at(2**17) > 0
    assert Hardware.from_json(hardware.to_json()) == hardware
    assert sum(dataclasses.astuple(measured.overheads["cpu"])) > 0
    assert measured.host_bytes > 0
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert told[-1] == (len(told) - 1, len(told) - 1, "")
    assert list((tmp_path / "spill").iterdir()) == []


def test_a_folder_that_takes_no_file_is_refused_by_name(tmp_path: Path) -> None:
    effort = dataclasses.replace(LEAST, request_bytes=(2**48,), file_bytes=2**48)
    with pytest.raises(EngineError, match="spill cannot be measured with a file of 281,474,976"):
        measure(tmp_path / "spill", effort=effort)


@pytest.mark.parametrize(
    "told",
    [
        Overheads(sweep_s=1e-3, step_s=2e-4, row_s=3e-5, row_step_s=4e-6),
        Overheads(sweep_s=0.0, step_s=2e-4, row_s=0.0, row_step_s=0.0),
    ],
)
def test_overheads_are_what_four_sweeps_say(told: Overheads) -> None:
    def sweep_s(layers: int, rows: int) -> float:
        return told.sweep_s + layers * told.step_s + rows * (told.row_s + layers * told.row_step_s)

    found = fit_overheads(
        [sweep_s(layers, rows) for layers in (2, 10) for rows in (1, 32)],
        layers=(2, 10),
        rows=(1, 32),
    )
    for field in dataclasses.fields(Overheads):
        expected = getattr(told, field.name)
        assert getattr(found, field.name) == pytest.approx(expected, abs=1e-12)


def test_noise_makes_no_overhead_negative() -> None:
    found = fit_overheads([4.0, 3.0, 2.0, 1.0], layers=(2, 10), rows=(1, 32))
    assert min(dataclasses.astuple(found)) >= 0


def test_what_a_prompt_costs_in_a_layer_is_beside_the_layers_own() -> None:
    known = Overheads(sweep_s=1e-3, step_s=2e-4, row_s=3e-5, row_step_s=4e-6)
    taken_s = tuple(
        known.sweep_s + 32 * known.row_s + layers * (known.step_s + 32 * 5e-5) for layers in (2, 10)
    )
    few_s, many_s = taken_s
    found = fit_prompts((few_s, many_s), known, layers=(2, 10), num_prompts=32)
    assert found == pytest.approx(5e-5)
    assert fit_prompts((many_s, few_s), known, layers=(2, 10), num_prompts=32) == 0.0


def _stat(busy: dict[int, int], steal: int = 0) -> str:
    """As the kernel tells it: ticks in user mode by core, and those that others' machines had."""
    cores = [f"cpu{core} {ticks} 0 0 5 5 0 0 {steal} 0 0" for core, ticks in busy.items()]
    return "\n".join(["cpu 9 9 9 9 9 9 9 9 9 9", *cores, "intr 1 2 3"])


def test_what_others_take_of_this_processs_cores_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, now_s, own_s = tmp_path / "stat", [100.0], [7.0]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 2})
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    monkeypatch.setattr("time.process_time", lambda: own_s[0])
    stat.write_text(_stat({0: 1000, 1: 1000, 2: 1000}))
    watch = OthersWatch(stat)
    now_s[0], own_s[0] = 110.0, 19.0
    stat.write_text(_stat({0: 1900, 1: 2000, 2: 1500}))  # 14 s of both, 12 of them our own
    assert watch.share() == pytest.approx(2 / 20)
    stat.write_text(_stat({0: 1900, 1: 2000, 2: 1500}, steal=100))
    assert watch.share() == pytest.approx(4 / 20)
    stat.unlink()
    assert watch.share() == 0.0


def test_a_busy_process_beside_is_noticed() -> None:
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        watch = OthersWatch()
        time.sleep(1.0)
        assert watch.share() > MOST_OTHERS_SHARE
    finally:
        for each in others:
            each.kill()
            each.wait()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Effort]:
    """The efforts that were spent; nothing is measured."""
    spent: list[Effort] = []

    def pretend(
        spill_dir: Path, *, effort: Effort, progress: Callable[..., None] | None = None
    ) -> Measured:
        spent.append(effort)
        return MEASURED

    monkeypatch.setattr(saved, "measure", pretend)
    return spent


def test_a_machine_is_measured_once_and_the_file_is_what_it_was(
    tmp_path: Path, counted: list[Effort]
) -> None:
    path = tmp_path / "state" / "profile.json"
    first = measured_or_saved(path, spill_dir=tmp_path, is_quick=True)
    assert measured_or_saved(path, spill_dir=tmp_path, is_quick=True) == first
    assert read_hardware(path) == first
    assert len(counted) == 1
    full = measured_or_saved(path, spill_dir=tmp_path, is_quick=False)
    assert (first.versions["effort"], full.versions["effort"]) == ("quick", "in full")
    assert measured_or_saved(path, spill_dir=tmp_path, is_quick=True) == full
    assert len(counted) == 2
    assert counted[0].seconds < counted[1].seconds
    measured_or_saved(path, spill_dir=tmp_path, is_quick=True, force=True)
    assert len(counted) == 3


def test_a_planner_is_told_what_was_measured(tmp_path: Path) -> None:
    hardware = hardware_here(tmp_path)
    assert hardware.host_bytes == 2**34
    assert hardware.disk_read == RateCurve(((2.0**16, 1e9), (2.0**20, 1e9), (2.0**25, 1e9)))
    assert hardware.gemm_flops_per_s("cpu", "float32", 64) == 56e9
    assert hardware.expand_rate("cpu", "float16", "bfloat16", 8) == 2e9
    assert hardware.elementwise_rate("cpu", "float32") == 1.2e10
    assert hardware.attention_rate("cpu", "float32", 1) == 6e9
    assert hardware.attention_rate("cpu", "bfloat16", 4) == 1.25e9
    assert hardware.to_gpu_pinned_bytes_per_s is None
    assert hardware.layer_overhead_s == 6e-4
    assert (hardware.row_overhead_s, hardware.row_layer_overhead_s) == (4e-5, 5e-6)
    assert (hardware.prompt_layer_overhead_s, hardware.expert_overhead_s) == (8e-5, 1e-4)
    assert (hardware.product_overhead_s, hardware.unit_overhead_s) == (1e-5, 2e-4)
    assert hardware.prompt_rate("cpu", "float32", 64) == 3e10
    assert hardware.lost_beside_reads == 0.1
    assert hardware.spread["gemm"] == 0.1


def test_a_run_that_took_longer_makes_every_rate_slower() -> None:
    measured = dataclasses.replace(MEASURED, factors={"compute": 1.25, "attention": 2.0})
    called, run = (hardware_of(each, {"cpu": "this one"}) for each in (MEASURED, measured))
    assert run.gemm_flops_per_s("cpu", "float32", 64) == pytest.approx(56e9 / 1.25)
    assert run.expand_rate("cpu", "bfloat16", "float32", 64) == pytest.approx(1.5e10 / 1.25)
    assert run.layer_overhead_s == pytest.approx(6e-4 * 1.25)
    assert run.prompt_rate("cpu", "float32", 64) == called.prompt_rate("cpu", "float32", 64) / 2
    assert run.disk_read == called.disk_read


def compared(
    *, elementwise_s: float, overhead_s: float, taken_s: float, products_s: float = 7.0
) -> Compared:
    foreseen = {
        "gemm_s": 5.0,
        "attention_s": 1.0,
        "elementwise_s": elementwise_s,
        "overhead_s": overhead_s,
    }
    taken_s += 3.0 + products_s
    return Compared(foreseen=foreseen, taken_s=taken_s, attended_s=3.0, products_s=products_s)


def test_few_rows_beside_many_tell_calls_from_what_goes_with_tokens() -> None:
    many = compared(elementwise_s=10.0, overhead_s=2.0, taken_s=12.0 + 4.0)
    few = compared(elementwise_s=2.0, overhead_s=1.0, taken_s=2.4 + 2.0, products_s=9.0)
    assert of_rest(many, few) == pytest.approx((1.2, 2.0))


def test_a_factor_beyond_bounds_leaves_the_rest_to_the_other() -> None:
    many = compared(elementwise_s=10.0, overhead_s=2.0, taken_s=10.0 + 8.0)
    few = compared(elementwise_s=2.0, overhead_s=1.0, taken_s=2.0 + 4.0)
    assert of_rest(many, few) == pytest.approx((1.2, 3.0))


def test_on_a_gpu_attention_and_products_are_of_the_work() -> None:
    many = compared(elementwise_s=4.0, overhead_s=2.0, taken_s=12.0 + 4.0 - 10.0)
    few = compared(elementwise_s=0.0, overhead_s=2.0, taken_s=7.2 + 4.0 - 10.0)
    assert of_all(many, few) == pytest.approx((1.2, 2.0))


def ran(folder: Path, config: Any, *, products_s: float, taken_s: float = 9.0) -> Ran:
    """Of a model of one layer, computed in float32."""
    stored = config.dtype or torch.float32
    seen = foresee(write_model(folder, config, stored), on_gpu=False)
    policy = Policy(
        compute=Tier.CPU,
        compute_dtype="float32",
        block_rows=3,
        sweep_tokens=16,
        micro_batch_tokens=19,
        kv=Split.on(Tier.CPU, 2**20),
        layer_splits=tuple(Split.on(Tier.CPU, each) for each in seen.shape.layer_bytes),
        reason="a test",
    )
    return Ran(
        shape=seen.shape,
        work=seen.work,
        policy=policy,
        probe=LEAST.probe,
        taken_s=taken_s,
        attended_s=0.1,
        products_s=products_s,
    )


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


def test_turning_is_what_products_of_weights_to_be_turned_take_longer(tmp_path: Path) -> None:
    hardware = hardware_here(tmp_path)
    as_is = ran(tmp_path / "as it is", transformers.LlamaConfig(**SMALL), products_s=0.5)
    config = transformers.LlamaConfig(**SMALL, dtype=torch.bfloat16)
    turned = ran(tmp_path / "turned", config, products_s=0.5)
    # Every matrix of the layer once in each of four sweeps, at 15 GB a second; a head of either.
    foreseen_s = 4 * 2 * (4 * 64 * 64 + 3 * 64 * 64) / 1.5e10
    assert foreseen(hardware, turned)["expand_s"] == pytest.approx(foreseen_s, rel=0.2)
    looks = [
        Probed(
            many=dataclasses.replace(as_is, products_s=0.5 + slower),
            few=as_is,
            turned=dataclasses.replace(turned, products_s=0.5 + slower + times * foreseen_s),
        )
        # The machine was slower in the second look, and turning in the third.
        for slower, times in ((0.0, 1.0), (0.3, 1.0), (0.0, 2.8))
    ]
    assert turning(hardware, looks) == pytest.approx(1.6, rel=0.1)


def test_experts_tell_what_layouts_take_and_what_an_expert_costs(tmp_path: Path) -> None:
    hardware = hardware_here(tmp_path)
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    known = ran(tmp_path / "experts", config, products_s=0.0)
    terms = foreseen(hardware, known)
    free = foreseen(dataclasses.replace(hardware, expert_overhead_s=0.0), known)
    experts_s = terms["overhead_s"] - free["overhead_s"]
    assert experts_s > 0
    products_s = terms["gemm_s"] + terms["head_s"] + 1.5 * terms["expand_s"]
    rest_s = terms["elementwise_s"] + free["overhead_s"] + 4.0 * experts_s
    taken_s = products_s + rest_s + known.attended_s
    sparse = dataclasses.replace(known, products_s=products_s, taken_s=taken_s)
    looks = [Probed(many=known, few=known, sparse=sparse)]
    assert of_experts(hardware, looks) == pytest.approx((1.5, 4.0))
    no_cost = dataclasses.replace(hardware, expert_overhead_s=0.0)
    assert of_experts(no_cost, looks)[1] == 1.0


def test_of_several_looks_the_mean_of_seconds_counts_and_the_spread_is_theirs() -> None:
    def look(per_s: float) -> list[Measurement]:
        rate = Rate(per_s=per_s, spread=0.1)
        return [Measurement(figure=Figure.GEMM, kind="cpu/float32", at=8, rate=rate)]

    (found,) = mean_measurements([look(2.0), look(6.0), look(3.0)])
    assert found.at == 8
    assert found.rate.per_s == pytest.approx(3.0)
    assert found.rate.spread == pytest.approx(4 / 3)
    (alike,) = mean_measurements([look(4.0), look(4.1), look(4.1)])
    assert alike.rate.spread == 0.1
    looks = [
        {"cpu": Overheads(sweep_s=sweep_s, step_s=1.0, row_s=2.0, row_step_s=0.0, unit_s=unit_s)}
        for sweep_s, unit_s in ((3.0, 1.0), (1.0, 3.0), (5.0, 2.0))
    ]
    mean = mean_overheads(looks)["cpu"]
    assert (mean.sweep_s, mean.step_s, mean.unit_s) == (3.0, 1.0, 2.0)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another processor": lambda data: data["versions"].update(cpu="Abacus"),
    "fewer cores": lambda data: data["versions"].update(cores="0"),
    "another library": lambda data: data["versions"].update(torch="0.1"),
    "a GPU less": lambda data: data["versions"].update(gpu="T4"),
    "another folder": lambda data: data["versions"].update({"spill folder": "/elsewhere"}),
    "other measurements": lambda data: data["versions"].update(profile="0"),
    "half a file": lambda data: data.pop("disk_read"),
    "an older form": lambda data: data.update(version=1),
    "others on the cores": lambda data: data.update(others_share=0.3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_it_is_measured_anew_for(what: str, tmp_path: Path, counted: list[Effort]) -> None:
    path = tmp_path / "profile.json"
    path.write_text(hardware_here(tmp_path).to_json())
    measured_or_saved(path, spill_dir=tmp_path, is_quick=False)
    assert counted == []
    data = json.loads(path.read_text())
    CHANGES[what](data)
    path.write_text(json.dumps(data))
    measured_or_saved(path, spill_dir=tmp_path, is_quick=True)
    assert len(counted) == 1


def test_a_profile_taken_beside_others_is_used_said_so_and_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shares = iter([0.4, 0.02])

    def pretend(*_: object, **__: object) -> Measured:
        return dataclasses.replace(MEASURED, others_share=next(shares))

    monkeypatch.setattr(saved, "measure", pretend)
    path = tmp_path / "profile.json"
    first = measured_or_saved(path, spill_dir=tmp_path, is_quick=True)
    assert first.is_crowded
    assert read_hardware(path).others_share == 0.4
    assert "others had 40% of the cores' time" in caplog.text
    assert "measured anew at the next start" in caplog.text
    again = measured_or_saved(path, spill_dir=tmp_path, is_quick=True)
    assert not again.is_crowded
    assert measured_or_saved(path, spill_dir=tmp_path, is_quick=True) == again


def test_a_file_that_describes_no_machine_is_named(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text("{}")
    with pytest.raises(HardwareError, match=r"machine\.json: a hardware file has version 3"):
        read_hardware(path)
