"""What becomes of a shard whose lines cannot all be rendered."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from jobs.line import Outcome
from tests.support.box import Box, completion_line
from tests.support.fake_engine import POISON, FakeEngine, FakeTokenizer
from worker.accumulator import Accumulator
from worker.context import IntakeContext
from worker.intake import validate_batch
from worker.render import Origin, Rendered, Renderer


class _OddRenderer(Renderer):
    """Raises what no caller expects, for the second line."""

    def render(self, origin: Origin, line_index: int, body: Mapping[str, Any]) -> Rendered:
        if line_index == 1:
            raise ValueError("a number nobody thought of")
        return super().render(origin, line_index, body)


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


def test_all_choices_of_all_prompts_make_one_answer(box: Box, context: IntakeContext) -> None:
    lines = [completion_line(0, prompt=["ab", "c"], n=3, logprobs=1), completion_line(1)]
    batch_id = box.add(lines, ring=False)
    validate_batch(context, batch_id)
    accumulator = _accumulator(box, context.renderer)
    assert accumulator.take((batch_id, 0)) == 2
    while accumulator.num_rows:
        accumulator.record(accumulator.sweep())
    assert [shard.is_last for shard in accumulator.pop_done()] == [True]
    rows = [json.loads(row) for row in box.ledger.lines.rows(batch_id, [Outcome.COMPLETED])]
    body = rows[0]["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    texts = [choice["text"] for choice in body["choices"]]
    assert texts[:3] == [texts[0]] * 3 != texts[3:] == [texts[3]] * 3
    assert body["system_fingerprint"] == "fp_fake"
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 12)
    assert box.batch(batch_id).usage.output_tokens == 12 + 2


def test_a_line_that_breaks_the_engine_takes_its_other_prompts_with_it(
    box: Box, context: IntakeContext
) -> None:
    bad = completion_line(0, prompt=[[5, 6], [POISON], [7]], n=2)
    batch_id = box.add([bad, completion_line(1)], ring=False)
    validate_batch(context, batch_id)
    accumulator = _accumulator(box, context.renderer)
    accumulator.take((batch_id, 0))
    while accumulator.num_rows:
        accumulator.record(accumulator.sweep())
    (done,) = accumulator.pop_done()
    assert done.is_last
    (row,) = [json.loads(row) for row in box.ledger.lines.rows(batch_id, [Outcome.FAILED])]
    assert (row["custom_id"], row["response"]["status_code"]) == ("c-0", 500)
    assert len(list(box.ledger.lines.rows(batch_id, [Outcome.COMPLETED]))) == 1
