"""Batches summed up for a plan: exact sums, bounded sizes, what is open and how long answers are."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.batch import BatchStatus
from jobs.ledger.ledger import Ledger
from jobs.line import Outcome, ResultRecord
from jobs.line_group import MAX_GROUPS, Grouping, LineGroup, OutputGroup
from tests.support.records import batch_record, line_records


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


@pytest.mark.parametrize("most_tokens", [3, 40, 2_000, 100_000])
def test_groups_are_few_and_their_sums_are_the_lines_own(most_tokens: int) -> None:
    draw = random.Random(most_tokens)
    grouping = Grouping()
    sums = dict.fromkeys(("prompt_tokens", "shared_tokens", "limit_tokens"), 0)
    for _ in range(3_000):
        line = {name: draw.randint(1, most_tokens) for name in sums}
        grouping.add(**line)
        sums = {name: sums[name] + line[name] for name in sums}
    groups = grouping.groups()
    assert 1 < len(groups) <= MAX_GROUPS
    assert sum(group.num_lines for group in groups) == 3_000
    for name, total in sums.items():
        assert sum(getattr(group, name) for group in groups) == total


def test_lines_of_unlike_size_are_told_apart() -> None:
    grouping = Grouping()
    for prompt_tokens in (10, 10, 11, 1_000, 1_010, 2_000):
        grouping.add(prompt_tokens=prompt_tokens, shared_tokens=4, limit_tokens=16)
    assert [(group.num_lines, group.prompt_tokens) for group in grouping.groups()] == [
        (2, 20),
        (1, 11),
        (2, 2_010),
        (1, 2_000),
    ]


def _begin(ledger: Ledger, *, num_lines: int, model: str = "m") -> str:
    batch = batch_record()
    ledger.batches.add(batch)
    found = line_records(num_lines, shard_lines=max(1, num_lines))
    groups = [LineGroup(num_lines=num_lines, prompt_tokens=70, shared_tokens=3, limit_tokens=90)]
    assert ledger.lines.begin(batch.id, model=model, found=found, refused=[], groups=groups)
    return batch.id


def _results(batch_id: str, lengths: list[int], outcome: Outcome) -> list[ResultRecord]:
    one = ResultRecord(batch_id=batch_id, line_index=0, outcome=outcome, row="{}")
    return [
        dataclasses.replace(one, line_index=index, output_tokens=length)
        for index, length in enumerate(lengths)
    ]


def test_the_ledger_tells_what_waits_of_one_model_and_how_long_answers_were(ledger: Ledger) -> None:
    batch_id = _begin(ledger, num_lines=6)
    _begin(ledger, num_lines=2, model="another")
    assert [batch.num_open for batch in ledger.groups.waiting("m")] == [6]
    ledger.lines.record(_results(batch_id, [5, 130, 5], Outcome.COMPLETED))
    ledger.lines.record(_results(batch_id, [0, 0, 0, 9], Outcome.FAILED)[3:])
    (waiting,) = ledger.groups.waiting("m")
    assert waiting.batch_id == batch_id
    assert waiting.num_open == 2
    assert waiting.groups == (
        LineGroup(num_lines=6, prompt_tokens=70, shared_tokens=3, limit_tokens=90),
    )
    assert waiting.outputs == (
        OutputGroup(num_lines=2, output_tokens=10),
        OutputGroup(num_lines=1, output_tokens=130),
    )
    ledger.lines.settle_rest(batch_id, Outcome.EXPIRED)
    assert ledger.groups.waiting("m") == []


def test_many_lengths_of_answers_are_few_groups(ledger: Ledger) -> None:
    batch_id = _begin(ledger, num_lines=1_001)
    ledger.lines.record(_results(batch_id, list(range(1_000)), Outcome.COMPLETED))
    (waiting,) = ledger.groups.waiting("m")
    assert 32 < len(waiting.outputs) <= 64
    assert sum(group.num_lines for group in waiting.outputs) == 1_000
    assert sum(group.output_tokens for group in waiting.outputs) == sum(range(1_000))


def test_a_batch_that_has_ended_waits_no_more(ledger: Ledger) -> None:
    batch_id = _begin(ledger, num_lines=6)
    assert ledger.batches.advance(batch_id, BatchStatus.CANCELLING)
    assert ledger.groups.waiting("m") == []
