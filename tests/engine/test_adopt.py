"""A policy changed under a loaded engine: tokens stay what they were, and what cannot change is named."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import Budgets, Completion, Prompt, Sampling
from engine.engine import Engine
from engine.errors import BudgetError
from engine.planning.policy import Split, Tier
from tests.support.policies import streaming
from tests.support.tiny_models import write_tiny_model

PROMPTS = [
    Prompt(key=str(row), token_ids=tuple(range(2, 20 + 7 * row)), sampling=Sampling(max_tokens=9))
    for row in range(7)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def engine(source: Path, tmp_path: Path) -> Iterator[Engine]:
    budgets = Budgets(gpu_bytes=0, host_bytes=2**28, disk_bytes=2**28, spill_dir=tmp_path / "spill")
    with Engine.load(source, budgets=budgets, policy=streaming(0.5, block_rows=2)) as engine:
        yield engine


def _answers(engine: Engine) -> dict[str, tuple[int, ...]]:
    return {done.key: done.token_ids for done in engine.generate(PROMPTS)}


def test_a_block_that_grows_and_shrinks_between_sweeps_answers_the_same(engine: Engine) -> None:
    alone = _answers(engine)
    before = engine.report()
    small = dataclasses.replace(engine.policy, sweep_tokens=16, micro_batch_tokens=8)
    done: list[Completion] = []
    for prompt in PROMPTS:
        engine.submit(prompt)
    for block_rows in (2, 6, 1, 7):
        engine.adopt(dataclasses.replace(small, block_rows=block_rows, reason=f"{block_rows} rows"))
        assert engine.block_rows == block_rows
        for _ in range(4):
            done += engine.sweep()
    while engine.num_rows:
        done += engine.sweep()
    assert {each.key: each.token_ids for each in done} == alone
    report = engine.report()
    assert report.policy_reason == "7 rows"
    assert max(report.since(before).sweeps_by_rows) > 2


def test_what_decides_where_bytes_lie_is_refused_by_name(engine: Engine) -> None:
    before = engine.policy
    kv = Split.on(Tier.CPU, before.kv.cpu_bytes // 2)
    with pytest.raises(BudgetError, match="cannot change its kv, num_slots"):
        engine.adopt(dataclasses.replace(before, block_rows=3, kv=kv, num_slots=3))
    with pytest.raises(BudgetError, match="the cpu tier needs"):
        engine.adopt(dataclasses.replace(before, sweep_tokens=10**7, micro_batch_tokens=10**7))
    assert engine.policy is before
    assert engine.block_rows == 2
