"""What the benchmarks make of their outcomes, without running an engine."""

import pytest

from bench.contenders import FREIGHT
from bench.figures import Ceilings, Row, table
from bench.legs.job import RESULT, Result
from bench.runner import Ending, Leg, Outcome
from bench.workloads import WORKLOADS, Sizes

_CEILINGS = Ceilings(
    disk_bytes_per_s=100.0,
    flops_per_s={"float32": 1_000.0, "bfloat16": 2_000.0},
    layer_parameters=50,
    head_parameters=10,
)


def _sizes(seed: int = 0) -> Sizes:
    return Sizes(
        rows=16,
        prompt_tokens=64,
        output_tokens=12,
        prefix_prompt_tokens=40,
        prefix_share=0.8,
        seed=seed,
    )


def _outcome(
    engine: str, ending: Ending, result: Result | None, *, dtype: str = "float32"
) -> Outcome:
    return Outcome(
        leg=Leg(engine=engine, setting=dtype, module="", options={"dtype": dtype}),
        ending=ending,
        results=() if result is None else (result,),
        peak_bytes=2**30,
        asked_tokens=100,
        deadline_s=60.0,
        words="",
    )


def _result(seconds: float, output_tokens: int, detail: dict[str, object] | None = None) -> Result:
    return Result(
        seconds=seconds,
        load_s=10.0,
        output_tokens=output_tokens,
        total_tokens=2 * output_tokens,
        read_bytes=0,
        detail=detail or {},
    )


def _table(*outcomes: Outcome) -> str:
    return table(
        [
            Row(ratio=2, workload="uniform", repetition=0, ceilings=_CEILINGS, outcome=outcome)
            for outcome in outcomes
        ]
    )


def test_a_sweeps_floor_is_the_longer_of_reading_and_multiplying() -> None:
    sweeps = [
        {"prompt_tokens": 40, "decoded_tokens": 0, "sampled_rows": 10},  # 4.2 s of products
        {"prompt_tokens": 0, "decoded_tokens": 10, "sampled_rows": 10},  # 1.2 s of products
    ]
    detail = {"sweeps": sweeps, "streamed_bytes": 400}  # 2 s of reading in each
    assert _CEILINGS.floor_s(detail, "float32") == pytest.approx(4.2 + 2.0)
    assert _CEILINGS.floor_s(detail, "bfloat16") == pytest.approx(2.1 + 2.0)


def test_results_are_found_among_what_an_engine_prints() -> None:
    line = (
        RESULT
        + '{"seconds": 2, "load_s": 1, "output_tokens": 6, "total_tokens": 9, "read_bytes": 0}'
    )
    (found,) = Result.parse(f"loading...\n{line}\nbye\n")
    assert (found.seconds, found.output_tokens) == (2, 6)


def test_freight_is_compared_with_each_engines_best() -> None:
    freight = _outcome(FREIGHT, Ending.DONE, _result(10, 100))
    slow = _outcome("peer", Ending.DONE, _result(50, 100))
    text = _table(freight, slow)
    assert "Freight, float32 is 5.00 times as fast as peer at its best." in text


def test_each_dtype_of_freight_has_its_own_roofline_and_its_own_comparison() -> None:
    sweeps = [{"prompt_tokens": 40, "decoded_tokens": 0, "sampled_rows": 10}]
    detail: dict[str, object] = {"sweeps": sweeps, "streamed_bytes": 0}  # 4.2 s, or 2.1 s
    text = _table(
        _outcome(FREIGHT, Ending.DONE, _result(10, 100, detail)),
        _outcome(FREIGHT, Ending.DONE, _result(5, 100, detail), dtype="bfloat16"),
        _outcome("peer", Ending.DONE, _result(20, 100), dtype="bfloat16"),
    )
    lines = text.splitlines()
    assert "10.00 (10.00-10.00) | 20.0 | 42% |" in lines[2]
    assert "20.00 (20.00-20.00) | 40.0 | 42% |" in lines[3]
    assert "5.00 (5.00-5.00) | 10.0 | 10% |" in lines[4]
    assert lines[4].endswith("| 2.00 x | 4.00 x |")
    assert "| roofline of the sweeps of Freight, float32 | 23.81 |" in text
    assert "| roofline of the sweeps of Freight, bfloat16 | 47.62 |" in text
    assert len({line.count("|") for line in lines[:7]}) == 1
    assert "Freight, bfloat16 is 4.00 times as fast as peer at its best." in text


def test_a_leg_cut_short_before_its_first_answer_gives_a_bound() -> None:
    freight = _outcome(FREIGHT, Ending.DONE, _result(10, 100))
    cut = _outcome("peer", Ending.CUT_SHORT, _result(0.0, 0))
    text = _table(freight, cut)
    assert "under 2.00 (cut short)" in text  # 100 tokens in the 50 s that loading left
    assert "over 5.00 x" in text


def test_a_leg_without_a_result_is_told_by_its_ending() -> None:
    assert "out of memory" in _table(_outcome("peer", Ending.OUT_OF_MEMORY, None))


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_for_the_same_seed_only(name: str) -> None:
    make = WORKLOADS[name]
    assert make(_sizes(), 1_000) == make(_sizes(), 1_000)
    assert make(_sizes(), 1_000) != make(_sizes(seed=1), 1_000)


def test_ragged_lengths_differ_and_stay_within_four_times_the_median() -> None:
    requests = WORKLOADS["ragged"](_sizes(), 1_000).requests
    lengths = {len(request.token_ids) for request in requests}
    assert len(lengths) > 8
    assert min(lengths) >= 16
    assert max(lengths) <= 256
    assert all(3 <= request.max_tokens <= 48 for request in requests)


def test_prefix_prompts_begin_alike_and_end_apart() -> None:
    workload = WORKLOADS["prefix"](_sizes(), 1_000)
    prompts = [request.token_ids for request in workload.requests]
    assert workload.shared_tokens == 32
    assert len({prompt[:32] for prompt in prompts}) == 1
    assert len({prompt[32:] for prompt in prompts}) == len(prompts)
