"""A prediction beside a run: terms compared like with like, and runs that teach nothing known as such."""

import dataclasses
from typing import Any, Final

import pytest

from engine.planning.corrections import ATTENTION, BETWEEN, BUS, COMPUTE, DISK, PRODUCTS
from engine.planning.policy import Policy, Split, Tier
from engine.planning.prediction import Prediction, SweepTerms
from engine.sweep.outcome import outcome_of
from engine.sweep.report import Report
from engine.timeline import Total, Track

POLICY: Final = Policy(
    compute=Tier.CPU,
    compute_dtype="float32",
    block_rows=32,
    sweep_tokens=64,
    micro_batch_tokens=96,
    kv=Split.on(Tier.CPU, 10),
    layer_splits=(),
    reason="a test",
)
PREDICTION: Final = Prediction(
    terms=SweepTerms(
        disk_read_s=0.3,
        gemm_s=0.2,
        head_s=0.05,
        elementwise_s=0.03,
        attention_s=0.1,
        expand_s=0.03,
        overhead_s=0.02,
    ),
    overlap=True,
    sweep_s=0.4,
    sweep_tokens=32,
    prompt_tokens=48,
    num_rows=32,
    tokens_per_s=80,
    job_s=100,
    job_tokens_per_s=70,
    startup_s=1,
    tail_s=2,
    latency_s=20,
    binding_lane="compute",
    binding_term="gemm_s",
    peak_bytes={},
)
REPORT: Final = Report(
    policy_reason="",
    num_sweeps=20,
    sweep_s=10.0,
    prompt_tokens=20 * 40,
    generated_tokens=20 * 24,
    weights_waited_s=1.0,
    products_s=5.0,
    totals={
        Track.DISK_READ: Total(num_spans=20, covered_s=8.0),
        Track.ATTENTION: Total(num_spans=20, covered_s=2.0),
    },
)


def test_what_goes_with_tokens_is_predicted_for_as_many_as_there_were() -> None:
    found = outcome_of(PREDICTION, POLICY, REPORT)
    assert found is not None
    assert found.is_steady
    moved = {DISK: 0.3, BUS: 0.0, ATTENTION: 0.08}
    assert found.predicted_s == pytest.approx(moved | {PRODUCTS: 0.8 * 0.28, BETWEEN: 0.8 * 0.05})
    measured = {DISK: 0.4, BUS: 0.0, ATTENTION: 0.1, PRODUCTS: 0.25, BETWEEN: 0.1}
    assert found.measured_s == pytest.approx(measured)
    assert (found.measured_sweep_s, found.measured_tokens_per_s) == (0.5, 48.0)
    told = found.as_dict()
    assert told["terms"][DISK] == {"predicted_s": 0.3, "measured_s": 0.4}
    assert told["tokens_per_s"] == {"predicted": 80, "measured": 48.0}


def test_on_a_gpu_attention_and_products_are_part_of_compute() -> None:
    totals = {Track.TO_GPU: Total(num_spans=20, covered_s=4.0)}
    report = dataclasses.replace(REPORT, totals=totals)
    found = outcome_of(PREDICTION, dataclasses.replace(POLICY, compute=Tier.GPU), report)
    assert found is not None
    assert found.predicted_s[ATTENTION] == found.measured_s[ATTENTION] == 0.0
    assert found.predicted_s[COMPUTE] == pytest.approx(0.43 * 0.8)
    assert found.measured_s[COMPUTE] == pytest.approx(0.45)
    assert found.measured_s[BUS] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_sweeps": 15},
        {"prompt_tokens": 0, "generated_tokens": 20 * 50},  # five eighths of a steady sweep
        {"generated_tokens": 20 * 85},
    ],
)
def test_runs_that_are_short_or_unlike_teach_nothing(changes: dict[str, Any]) -> None:
    found = outcome_of(PREDICTION, POLICY, dataclasses.replace(REPORT, **changes))
    assert found is not None
    assert not found.is_steady


def test_no_sweeps_have_no_outcome() -> None:
    assert outcome_of(PREDICTION, POLICY, Report(policy_reason="")) is None
