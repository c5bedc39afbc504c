"""The report: its arithmetic by hand, and that a real run's figures fit together."""

import json
from pathlib import Path

import pytest

from engine.config import Budgets, Completion, Prompt, Sampling
from engine.engine import Engine
from engine.memory.footprint import folder_bytes, peak_host_bytes
from engine.planning.ceilings import Ceilings
from engine.sweep.report import Report
from engine.timeline import Total, Track
from tests.support.policies import streaming
from tests.support.tiny_models import NUM_LAYERS, write_tiny_model

CEILINGS = Ceilings(gemm_flops_per_s=100.0, memory_bytes_per_s=50.0, disk_read_bytes_per_s=10.0)


def busy(seconds: float, *, num_bytes: int = 0, flops: int = 0) -> Total:
    return Total(num_spans=1, busy_s=seconds, covered_s=seconds, num_bytes=num_bytes, flops=flops)


def test_an_io_bound_run_says_what_of_compute_was_hidden() -> None:
    report = Report(
        policy_reason="",
        ceilings=CEILINGS,
        num_sweeps=2,
        sweep_s=10.0,
        weights_fetched_s=9.0,
        weights_waited_s=6.3,
        totals={
            Track.DISK_READ: busy(9.0, num_bytes=80),
            Track.LAYERS: busy(3.0, flops=200),
            Track.HEAD: busy(0.5, flops=10),
            Track.SAMPLING: busy(0.5),
            Track.ATTENTION: busy(1.0, num_bytes=5),
        },
        idle_s={Track.DISK_READ: 0.25, Track.TO_GPU: 6.0},
    )
    assert report.bottleneck is Track.DISK_READ
    assert (report.io_s, report.compute_s) == (9.0, 4.0)
    assert report.hidden_io_share == pytest.approx(0.3)
    assert report.hidden_compute_share == pytest.approx(0.75)
    assert report.bubbles_s == 0.25
    assert report.roofline_s == 8.0, "80 bytes at 10 a second take longer than 210 FLOP at 100"
    assert report.roofline_share == 0.8
    shares = {line.name: line.share for line in report.lines()}
    assert shares == {
        "disk read": pytest.approx(80 / 9 / 10),
        "layers": pytest.approx(200 / 3 / 100),
        "attention": pytest.approx(5 / 1 / 50),
        "head": pytest.approx(0.2),
        "sampling": None,
    }


def test_a_run_in_memory_has_no_io_to_hide_and_a_roofline_of_compute() -> None:
    report = Report(
        policy_reason="",
        ceilings=CEILINGS,
        num_sweeps=1,
        sweep_s=4.0,
        totals={Track.LAYERS: busy(3.0, flops=200)},
        idle_s={Track.DISK_READ: 1.0, Track.TO_GPU: 1.0},
    )
    assert report.bottleneck is None
    assert report.hidden_io_share is None
    assert report.hidden_compute_share is None
    assert (report.bubbles_s, report.roofline_s, report.roofline_share) == (1.0, 2.0, 0.5)
    assert "hidden_io_share" not in report.as_dict()


def test_shares_stay_within_none_and_all() -> None:
    totals = {Track.DISK_READ: busy(1.0, num_bytes=1), Track.LAYERS: busy(2.0, flops=1)}
    slow = Report(policy_reason="", sweep_s=50.0, weights_fetched_s=1, totals=totals)
    assert (slow.hidden_io_share, slow.hidden_compute_share) == (1.0, 0.0)
    waited = Report(
        policy_reason="", sweep_s=0.5, weights_fetched_s=1, weights_waited_s=2, totals=totals
    )
    assert (waited.hidden_io_share, waited.hidden_compute_share) == (0.0, 1.0)


def budgets_of(folder: Path) -> Budgets:
    return Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=folder / "spill")


def prompts(count: int, *, max_tokens: int = 5, num_tokens: int = 40) -> list[Prompt]:
    return [
        Prompt(
            key=str(number),
            token_ids=tuple(2 + (number + at) % 200 for at in range(num_tokens)),
            sampling=Sampling(max_tokens=max_tokens, ignore_eos=True),
        )
        for number in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", "llama")


def test_a_real_runs_figures_fit_together(folder: Path) -> None:
    policy = streaming(0.5)
    with Engine.load(folder, budgets=budgets_of(folder), policy=policy) as engine:
        assert len(list(engine.generate(prompts(12)))) == 12
        report = engine.report()
        streamed = engine.policy.streamed_bytes
    totals = report.totals
    assert totals[Track.SWEEP].num_spans == report.num_sweeps
    assert totals[Track.WAIT].num_spans == report.num_sweeps * (NUM_LAYERS + 1)  # and the head
    assert totals[Track.DISK_READ].num_bytes >= report.num_sweeps * streamed > 0
    matrices = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    # The last token sampled is never computed; attention comes on top.
    assert report.prompt_tokens == 12 * 40
    computed = 12 * (40 + 5 - 1)
    pairs = 12 * sum(range(1, 40 + 5))
    attention = 4 * 64 * pairs * NUM_LAYERS
    assert totals[Track.LAYERS].flops == 2 * matrices * computed * NUM_LAYERS + attention
    assert totals[Track.ATTENTION].flops == attention
    assert totals[Track.HEAD].flops == 2 * 64 * 256 * report.generated_tokens
    assert report.generated_tokens == 12 * 5
    assert 0 < totals[Track.ATTENTION].busy_s < totals[Track.LAYERS].busy_s
    assert report.compute_s + totals[Track.WAIT].covered_s <= report.sweep_s
    assert 0 <= report.bubbles_s <= report.sweep_s - report.compute_s
    assert report.peak_rows == 8
    assert sum(report.sweeps_by_rows.values()) == report.num_sweeps


def test_what_is_told_is_flat_and_plain(folder: Path) -> None:
    policy = streaming(0.5)
    with Engine.load(folder, budgets=budgets_of(folder), policy=policy) as engine:
        list(engine.generate(prompts(3)))
        told = engine.report().as_dict()
    assert json.loads(json.dumps(told)) == told
    assert all(isinstance(value, int | float | str) for value in told.values())
    assert told["disk_read_bytes"] > 0
    assert told["disk_read_ceiling_bytes_per_s"] > 0
    assert told["layers_flop_per_s"] > 0
    assert told["peak_cpu_bytes"] > 0
    assert told["peak_disk_bytes"] > 0
    assert told["peak_rows"] == 3
    assert 0 <= told["hidden_io_share"] <= 1
    assert told["roofline_share"] > 0


def test_the_difference_of_two_reports_is_of_the_time_between_them(folder: Path) -> None:
    policy = streaming(0.5)
    with Engine.load(folder, budgets=budgets_of(folder), policy=policy) as engine:
        list(engine.generate(prompts(8, max_tokens=3)))
        first = engine.report()
        done: list[Completion] = list(engine.generate(prompts(2, max_tokens=4)))
        both = engine.report()
    second = both.since(first)
    assert len(done) == second.completions == 2
    assert (second.generated_tokens, second.prompt_tokens) == (8, 80)
    assert second.num_sweeps == both.num_sweeps - first.num_sweeps
    assert (first.peak_rows, second.peak_rows) == (both.peak_rows, 2)
    assert sum(second.sweeps_by_rows.values()) == second.num_sweeps
    assert second.totals[Track.HEAD].flops == 2 * 64 * 256 * 8
    assert second.sweep_s == pytest.approx(both.sweep_s - first.sweep_s)
    assert second.peak_bytes == both.peak_bytes
    assert both.since(both).as_dict()["generated_tokens"] == 0


def test_peaks_are_the_systems_own_figures(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t   1024 kB\n")
    assert peak_host_bytes(status) == 2 * 2**20
    assert peak_host_bytes() > 10 * 2**20
    spill = tmp_path / "spill" / "packs"
    spill.mkdir(parents=True)
    (spill / "weights.bin").write_bytes(b"x" * 100_000)
    with (spill / "hole.bin").open("wb") as file:
        file.truncate(10**9)
    assert 100_000 <= folder_bytes(tmp_path / "spill") < 10**6
    assert folder_bytes(tmp_path / "none") == 0
