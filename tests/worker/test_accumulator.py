"""What becomes of a shard whose lines cannot all be rendered."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from engine.config import Prompt
from jobs.batch import Batch
from jobs.line import Outcome
from tests.support.box import Box, completion_line
from tests.support.fake_engine import FakeEngine, FakeTokenizer
from worker.accumulator import Accumulator
from worker.context import IntakeContext
from worker.intake import validate_batch
from worker.render import Renderer


class _OddRenderer(Renderer):
    """Raises what no caller expects, for the second line."""

    def prompt(self, batch: Batch, line_index: int, body: Mapping[str, Any]) -> Prompt:
        if line_index == 1:
            raise ValueError("a number nobody thought of")
        return super().prompt(batch, line_index, body)


def _accumulator(box: Box, renderer: Renderer) -> Accumulator:
    return Accumulator(
        engine=FakeEngine(),
        ledger=box.ledger,
        store=box.store,
        renderer=renderer,
        model_id="tiny",
    )


def _begun(box: Box, context: IntakeContext) -> str:
    batch_id = box.add([completion_line(index) for index in range(3)], ring=False)
    validate_batch(context, batch_id)
    return batch_id


def test_a_shard_that_cannot_be_rendered_is_not_held(box: Box, context: IntakeContext) -> None:
    batch_id = _begun(box, context)
    accumulator = _accumulator(box, _OddRenderer(tokenizer=FakeTokenizer(), max_context_tokens=256))
    with pytest.raises(ValueError, match="nobody"):
        accumulator.take((batch_id, 0))
    assert accumulator.num_rows == 0
    assert accumulator.pop_done() == []
    assert not accumulator.rows_by_batch()


def test_a_damaged_line_of_the_snapshot_gets_a_500(box: Box, context: IntakeContext) -> None:
    batch_id = _begun(box, context)
    (_, damaged, _) = box.ledger.lines.unsettled(batch_id, 0)
    with box.store.read(box.batch(batch_id).input_blob) as stream:
        raw = bytearray(stream.read())
    raw[damaged.offset_bytes] = ord("?")
    with box.store.write(box.batch(batch_id).input_blob) as written:
        written.write(bytes(raw))
    accumulator = _accumulator(box, context.renderer)
    accumulator.take((batch_id, 0))
    (row,) = [json.loads(row) for row in box.ledger.lines.rows(batch_id, [Outcome.FAILED])]
    assert (row["custom_id"], row["response"]["status_code"]) == ("c-1", 500)
    while accumulator.num_rows:
        accumulator.record(accumulator.sweep())
    assert [shard.is_last for shard in accumulator.pop_done()] == [True]
