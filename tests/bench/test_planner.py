"""What the planner's benchmark decides and concludes by itself: cases, budgets, grids, errors."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from bench import planner
from bench.planner_cases import (
    MODELS,
    RATIOS,
    Case,
    cases,
    host_budget_bytes,
    prompts_of,
    requests_of,
    spread_out,
    weight_bytes,
)
from bench.planner_figures import Ran, best_alternatives, grid_table, largest_miss, table
from bench.planner_grid import alternatives, in_turns, interleaved
from bench.workloads import workload_of
from engine.planning.cost import check_budgets
from engine.planning.planners.base import Wishes
from engine.planning.planners.milp import plan_milp
from engine.planning.policy import Policy
from engine.sweep.outcome import Outcome
from tests.support.profiles import hardware_here
from tests.support.situations import budgets_of, plain_shape, situation_of

# Few keys and values: room for rows is not worth more than room for weights.
SHAPE = dataclasses.replace(plain_shape(24, columns=500), kv_bytes_per_token=24 * 256)
SIZES = planner.scale_of(is_quick=False, seed=0).sizes
RAGGED = next(case for case in cases() if case.job == "ragged")
WORKLOAD = workload_of(requests_of(RAGGED, SIZES))


def planned(ratio: float) -> tuple[Policy, Any]:
    budgets = budgets_of(host_bytes=host_budget_bytes(SHAPE, WORKLOAD, ratio))
    wishes = Wishes(situation=situation_of(SHAPE, WORKLOAD))
    return plan_milp(SHAPE, budgets, wishes), budgets


def ran(policy: Policy, rate: float, *, predicted: float = 100.0, is_planned: bool = False) -> Ran:
    outcome = Outcome(
        predicted_s={"disk read": 0.5, "compute": 1.0},
        measured_s={"disk read": 0.4, "compute": 1.6},
        predicted_sweep_s=1.0,
        measured_sweep_s=2.0,
        predicted_tokens_per_s=predicted,
        measured_tokens_per_s=rate,
        is_steady=True,
    )
    return Ran(
        case=RAGGED,
        policy=policy,
        host_bytes=1,
        is_planned=is_planned,
        job_s=1.0,
        predicted_tokens_per_s=predicted,
        measured_tokens_per_s=rate,
        preempted_rows=0,
        outcome=outcome,
    )


def test_cases_are_of_every_model_ratio_job_and_stored_dtype() -> None:
    found = cases()
    assert len(set(found)) == len(found) == len(MODELS) * len(RATIOS) * 2
    assert len({(case.model, case.stored, case.job) for case in found}) == len(MODELS) * 4
    assert len({(case.ratio, case.stored) for case in found}) == len(RATIOS) * 2


def test_a_few_of_them_are_unlike_and_all_are_all() -> None:
    few = spread_out(cases(), 3)
    assert {case.model for case in few} == set(MODELS)
    assert len({case.ratio for case in few}) == 3
    assert len({case.job for case in few}) == 2
    for count in range(1, len(cases()) + 1):
        assert len(set(spread_out(cases(), count))) == count
    assert set(spread_out(cases(), 99)) == set(cases())


def test_the_planner_is_told_the_lengths_that_run() -> None:
    requests = requests_of(RAGGED, SIZES)
    assert WORKLOAD.num_rows == len(requests) == sum(each.count for each in WORKLOAD.requests)
    asked = sum(prompt.sampling.max_tokens for prompt in prompts_of(requests))
    assert WORKLOAD.mean_output_tokens * WORKLOAD.num_rows == pytest.approx(asked)
    assert all(prompt.sampling.ignore_eos for prompt in prompts_of(requests))


def test_a_budget_leaves_a_ratios_part_for_weights_and_can_be_planned_for() -> None:
    tight, roomy = (host_budget_bytes(SHAPE, WORKLOAD, ratio) for ratio in (4.0, 0.5))
    assert roomy - tight == pytest.approx(weight_bytes(SHAPE) * (2 - 1 / 4), abs=1)
    assert planned(4.0)[0].streamed_bytes > 0
    assert planned(0.5)[0].streamed_bytes == 0


def test_a_grid_has_enough_legal_policies_no_two_alike_over_all_dimensions() -> None:
    policy, budgets = planned(2.0)
    found = alternatives(SHAPE, budgets, WORKLOAD, policy, count=30, seed=0)
    decided = [dataclasses.replace(each, reason="") for each in found]
    assert len(found) == 30
    assert all(one != other for one, other in itertools.combinations(decided, 2))
    for each in found:
        check_budgets(SHAPE, each, budgets)
    for field in ("block_rows", "sweep_tokens", "unit_bytes", "num_slots", "streamed_bytes"):
        assert len({getattr(each, field) for each in found}) > 1, field
    assert any(each.micro_batch_tokens < each.block_rows + each.sweep_tokens for each in found)


def test_the_planned_policy_is_run_first_last_and_between() -> None:
    assert interleaved(list("abcd"), "P", times=3) == list("PabPcdP")
    assert interleaved([], "P", times=2) == ["P", "P"]


def test_finalists_take_turns_at_being_first() -> None:
    found = in_turns(list("abc"), times=4)
    assert "".join(found) == "abc" + "bca" + "cab" + "abc"


def test_the_largest_miss_is_told_in_shares_of_the_measured_sweep() -> None:
    assert largest_miss(ran(planned(2.0)[0], 1.0).outcome) == "compute -30% of a sweep"


def test_errors_are_of_the_run_with_the_median_error_and_of_all() -> None:
    policy, _ = planned(2.0)
    exact = [ran(policy, rate) for rate in (50.0, 100.0, 400.0)]
    # Of two the one that is off further, whichever way.
    slow = [ran(policy, rate) for rate in (80.0, 90.0)]
    text = table([exact, slow])
    assert "error of configurations: median 12.5%, worst 25.0%" in text
    assert "error of all runs: median 25.0%, worst 100.0%" in text
    assert "| 100 (50-400) | 100 | +0% | disk read 0.500/0.400" in text
    assert "| 80 (80-90) | 100 | +25% |" in text


def test_a_grid_is_judged_by_the_runs_in_turns_alone() -> None:
    policy, _ = planned(2.0)
    lucky, best, slow = (
        dataclasses.replace(policy, reason=name) for name in ("lucky", "best", "slow")
    )
    first = [ran(each, rate) for each, rate in ((lucky, 300.0), (best, 120.0), (slow, 20.0))]
    first += [ran(policy, 10.0, is_planned=True)]
    finals = [ran(policy, rate, is_planned=True) for rate in (90.0, 95.0, 99.0)]
    finals += [ran(lucky, rate) for rate in (80.0, 82.0, 81.0)]
    finals += [ran(best, rate) for rate in (90.0, 100.0, 150.0)]
    assert [its[0].policy.reason for its in best_alternatives(first)] == ["lucky", "best", "slow"]
    runs = first + [dataclasses.replace(run, is_final=True) for run in finals]
    line = grid_table([runs]).splitlines()[-1]
    assert line.endswith("| 3 | 95 (90-99) | 100 | 95% | best |")


def test_the_benchmark_runs_and_keeps_every_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(hardware_here(tmp_path).to_json())
    words = ["--quick", "--cases", "1", "--repetitions", "1", "--grid", "1", "--alternatives", "1"]
    paths = ["--cache", str(tmp_path), "--profile", str(profile), "--json", str(tmp_path / "runs")]
    assert planner.main([*words, *paths]) == 0
    printed = capsys.readouterr().out
    assert "error of configurations: median" in printed
    assert "planned over best" in printed
    # One to measure; three and one in the grid, and both again six times.
    assert len((tmp_path / "runs").read_text().splitlines()) == 1 + 4 + 2 * 6


def test_a_case_says_what_it_is() -> None:
    case = Case(model="opt", stored=RAGGED.stored, ratio=2.0, job="ragged")
    assert case.name == f"opt {RAGGED.stored_name}, ratio 2, ragged"
