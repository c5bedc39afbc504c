"""The steps from FlexGen's loop to Freight's: what each hands to the engine, and one run of all."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from bench import gpu_offload
from bench.ablation import FLEXGEN, Ran, blocks, padded, schedules, table, unshared
from bench.flexgen_loop import job
from bench.opt_shape import OPT_SHAPES
from bench.seeded_model import write_checkpoint
from bench.workloads import Request, Sizes
from engine.sweep.report import Report

VOCAB = 300


def requests_of(lengths: Sequence[tuple[int, int]]) -> list[Request]:
    return [
        Request(key=str(index), token_ids=(7,) * length, max_tokens=limit)
        for index, (length, limit) in enumerate(lengths)
    ]


REQUESTS = requests_of([(3, 5), (9, 2), (4, 4), (2, 8), (6, 1)])


def cut(schedule: str, *, kv_tokens: int = 10_000, block_rows: int = 2) -> list[list[Request]]:
    [chosen] = [each for each in schedules() if schedule in each.name]
    return list(blocks(REQUESTS, chosen, kv_tokens=kv_tokens, block_rows=block_rows, vocab=VOCAB))


def test_each_step_changes_one_thing_and_the_last_leaves_nothing_out() -> None:
    fields = [field.name for field in dataclasses.fields(FLEXGEN) if field.name != "name"]
    switches = [tuple(getattr(each, field) for field in fields) for each in schedules()]
    changes = [
        sum(a != b for a, b in zip(one, other, strict=True))
        for one, other in itertools.pairwise(switches)
    ]
    assert changes == [1, 1, 1, 1]
    assert schedules()[0] == FLEXGEN
    assert switches[-1] == (True, False, False, True)


def test_a_padded_block_is_as_long_as_its_longest_in_both_ways() -> None:
    block = padded(REQUESTS[:3])
    assert {(len(each.token_ids), each.max_tokens) for each in block} == {(9, 5)}
    assert [each.token_ids[-3:] for each in block] == [(7, 7, 7)] * 3
    assert [each.key for each in block] == ["0", "1", "2"]


def test_unshared_prompts_keep_their_lengths_and_begin_unlike() -> None:
    many = [unshared(REQUESTS[1], number, VOCAB) for number in range(1000)]
    assert {len(each.token_ids) for each in many} == {9}
    assert len({each.token_ids[:2] for each in many}) == 1000
    assert all(2 <= token < VOCAB for each in many for token in each.token_ids)
    assert len(unshared(dataclasses.replace(REQUESTS[0], token_ids=(7,)), 5, VOCAB).token_ids) == 1


def test_static_blocks_are_cut_by_rows_and_by_room_and_others_not_at_all() -> None:
    assert [len(block) for block in cut("FlexGen's loop")] == [2, 2, 1]
    assert [len(block) for block in cut("FlexGen's loop", kv_tokens=17 * 3, block_rows=4)] == [3, 2]
    assert [len(block) for block in cut("FlexGen's loop", kv_tokens=1)] == [1] * 5
    assert [len(block) for block in cut("without padding")] == [2, 2, 1]
    assert [len(block) for block in cut("refilled")] == [5]
    assert cut("Freight") == [REQUESTS]
    [ragged] = cut("refilled")
    assert [len(each.token_ids) for each in ragged] == [len(each.token_ids) for each in REQUESTS]


def test_the_job_of_the_llama_shape_is_ragged_behind_one_beginning() -> None:
    sizes = Sizes(
        rows=20,
        prompt_tokens=16,
        output_tokens=8,
        prefix_prompt_tokens=32,
        prefix_share=1.0,
        seed=0,
    )
    requests = job(sizes, VOCAB)
    assert len({each.token_ids[:32] for each in requests}) == 1
    assert len({each.token_ids[32:] for each in requests}) == 20
    assert len({each.max_tokens for each in requests}) > 3
    assert requests == job(sizes, VOCAB)


def test_the_table_counts_useful_tokens_only() -> None:
    reports = [Report(policy_reason="", num_sweeps=9, sweep_s=2.0, generated_tokens=300)] * 2
    runs = [
        Ran(schedule=schedule, seconds=seconds, useful_tokens=100, report=report)
        for schedule, seconds, report in zip(schedules()[::4], (4.0, 2.0), reports, strict=True)
    ]
    lines = table(runs).splitlines()
    assert lines[2] == "| FlexGen's loop | 25.00 (25.00-25.00) | 1.00 x | 9 | 3.00 |  |  |  |"
    assert "| 50.00 (50.00-50.00) | 2.00 x |" in lines[3]


def test_the_seeded_opt_is_one_that_the_library_loads_whole(tmp_path: Path) -> None:
    shape = OPT_SHAPES["tiny"]
    folder = write_checkpoint(shape.checkpoint(tmp_path), shape)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values())
    assert model.config.do_layer_norm_before
    assert model(torch.arange(2, 20)[None]).logits.isfinite().all()
    large = sum(torch.Size(sizes).numel() for _, sizes in OPT_SHAPES["30b"].tensors())
    assert large == pytest.approx(30e9, rel=0.01)


def test_the_benchmark_runs_on_a_tiny_shape_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--shapes tiny --device cpu --planner fixed --rows 6 --block-rows 4 --prompt-tokens 20 --output-tokens 3"
    assert gpu_offload.main([*words.split(), "--host-gib", "0.4", "--cache", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [each.name for each in schedules()]
    # Six rows by four: two blocks of a prompt and two more tokens each, or one that is refilled.
    assert [row[3] for row in rows[:3]] == ["6"] * 3
    assert {row[4] for row in rows} == {f"{(20 + 3) / 3:.2f}"}
