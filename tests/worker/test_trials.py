"""Who is blamed when a sweep raises, and what the report keeps."""

import math
from pathlib import Path

import pytest

from engine.config import Prompt, Sampling
from engine.sweep.report import Report
from tests.support.fake_engine import MORTAL, POISON, FakeEngine
from worker.run_report import RunReport
from worker.trials import EngineBrokenError, EngineDeadError, Trials


def _prompt(index: int, *, token: int = 5, max_tokens: int = 3) -> Prompt:
    sampling = Sampling(max_tokens=max_tokens)
    return Prompt(key=f"b/{index}", token_ids=(index, token), sampling=sampling)


def _run(trials: Trials, num_sweeps: int = 400) -> tuple[set[str], set[str]]:
    finished, blamed = set(), set()
    for _ in range(num_sweeps):
        if not trials.num_rows:
            break
        swept = trials.sweep()
        finished |= {completion.key for completion in swept.completions}
        blamed |= set(swept.blamed)
    return finished, blamed


@pytest.mark.parametrize("poisonous", [{0}, {15}, {7}, {3, 12}])
def test_only_poisonous_rows_are_blamed(poisonous: set[int]) -> None:
    trials = Trials(FakeEngine())
    for index in range(16):
        trials.submit(_prompt(index, token=POISON if index in poisonous else 5))
    trials.sweep()
    trials.submit(_prompt(99))  # arrives during the trials
    finished, blamed = _run(trials)
    assert blamed == {f"b/{index}" for index in poisonous}
    assert finished == {f"b/{index}" for index in {*range(16), 99} - poisonous}


def test_a_cancelled_row_is_not_tried_again() -> None:
    trials = Trials(FakeEngine())
    for index in range(4):
        trials.submit(_prompt(index, token=POISON if index == 1 else 5))
    trials.sweep()
    trials.cancel("b/1")
    trials.cancel("b/3")
    finished, blamed = _run(trials)
    assert (finished, blamed) == ({"b/0", "b/2"}, set())


def test_a_broken_engine_is_told_from_a_bad_row() -> None:
    trials = Trials(FakeEngine(raises_always=True))
    for index in range(32):
        trials.submit(_prompt(index))
    with pytest.raises(EngineBrokenError, match="every row"):
        _run(trials, num_sweeps=2 * int(math.log2(32)) + 4)


def test_an_engine_that_raises_even_when_rows_are_to_leave_is_dead() -> None:
    trials = Trials(FakeEngine())
    for index in range(4):
        trials.submit(_prompt(index, token=MORTAL if index == 1 else 5))
    with pytest.raises(EngineDeadError, match="device-side assert"):
        trials.sweep()


def test_the_report_joins_sweeps_over_the_same_batches(tmp_path: Path) -> None:
    report = RunReport(tmp_path)
    engine_report = Report(policy_reason="none", num_sweeps=3)
    report.close(engine_report)
    assert not list(tmp_path.iterdir())
    for _ in range(52):
        report.note({"a": 2}, num_settled=0)
        report.note({"a": 3}, num_settled=1)
        report.note({"a": 1, "b": 4}, num_settled=0)
        report.close(engine_report)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 50
    assert '"num_batches": 2' in files[-1].read_text()
