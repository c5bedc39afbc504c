"""When a batch may be done, by what waits before it and beside it."""

import pytest

from jobs.ledger.progress import Pace
from jobs.line import Outcome, ResultRecord
from tests.support.box import Box, completion_line
from tests.support.fake_engine import FakeEngine
from worker.context import IntakeContext
from worker.estimates import Work, estimated, note_estimates
from worker.intake import validate_batch
from worker.pace import PaceMeter
from worker.reconcile import reconcile

PLAIN = (0, float("inf"))
HIGH = (-5, float("inf"))


def seconds(works: list[Work], per_s: float | None = 10.0) -> list[float | None]:
    found = estimated(works, tokens_per_s=per_s, noted_at=1)
    return [found[work.batch_id].seconds_left for work in works]


def test_equals_share_and_the_first_rank_goes_alone() -> None:
    small = Work(batch_id="a", rank=PLAIN, tokens_left=100)
    large = Work(batch_id="b", rank=PLAIN, tokens_left=1_000)
    first = Work(batch_id="c", rank=HIGH, tokens_left=500)
    assert seconds([large]) == [100]
    assert seconds([small, large]) == [20, 110]
    assert seconds([small, large, first]) == [70, 160, 50]
    found = estimated([small, large, first], tokens_per_s=10, noted_at=7)
    assert {name: each.position for name, each in found.items()} == {"a": 2, "b": 3, "c": 1}
    assert {each.noted_at for each in found.values()} == {7}


@pytest.mark.parametrize("per_s", [None, 0.0])
def test_nothing_is_promised_that_is_not_known(per_s: float | None) -> None:
    work = Work(batch_id="a", rank=PLAIN, tokens_left=100)
    assert seconds([work], per_s) == [None]
    new = Work(batch_id="b", rank=PLAIN, tokens_left=None)
    assert seconds([work, new]) == [10, None]


def test_what_is_left_is_learned_from_what_is_done(box: Box, context: IntakeContext) -> None:
    lines = [completion_line(index, max_tokens=100) for index in range(64)]
    batch_id = box.add(lines, ring=False)
    box.ledger.progress.note_pace("tiny", Pace(predicted_tokens_per_s=100.0))
    reconcile(box.ledger, box.doorbell, box.store, shards_ahead=1)
    early = box.batch(batch_id).estimate
    assert early is not None
    assert (early.position, early.seconds_left) == (1, None)  # not looked at yet
    validate_batch(context, batch_id)
    note_estimates(box.ledger, [box.batch(batch_id)])
    before = box.batch(batch_id).estimate
    assert before is not None
    assert before.seconds_left == pytest.approx(64.0)
    box.ledger.lines.record(
        [
            ResultRecord(
                batch_id=batch_id,
                line_index=index,
                outcome=Outcome.COMPLETED,
                row="{}",
                output_tokens=10,
            )
            for index in range(32)
        ]
    )
    box.ledger.progress.note_pace("tiny", Pace(tokens_per_s=50.0, predicted_tokens_per_s=100.0))
    note_estimates(box.ledger, [box.batch(batch_id)])
    after = box.batch(batch_id).estimate
    assert after is not None
    assert after.tokens_per_s == 50.0
    assert after.seconds_left == pytest.approx(32 * 55 / 50)  # half of the doubt is gone


def test_the_pace_is_what_the_engine_generated_over_the_time_it_took(box: Box) -> None:
    now_s, engine = 100.0, FakeEngine()
    meter = PaceMeter(box.ledger.progress, model_id="tiny", engine=engine, clock=lambda: now_s)
    meter.begin()
    engine.num_generated, now_s = 30, 103.0
    meter.note(None)
    assert box.ledger.progress.pace("tiny") == Pace(tokens_per_s=10.0)
    engine.num_generated, now_s = 1_000, 104.0
    meter.note(None)  # too soon after the last one
    assert box.ledger.progress.pace("tiny") == Pace(tokens_per_s=10.0)
    engine.num_generated, now_s = 200, 110.0
    meter.note(None)
    assert box.ledger.progress.pace("tiny") == Pace(tokens_per_s=20.0)
    now_s = 1_000.0
    meter.begin()  # the night between counts for nothing
    engine.num_generated, now_s = 260, 1_002.0
    meter.note(None)
    assert box.ledger.progress.pace("tiny") == Pace(tokens_per_s=30.0)
