"""The benchmarks' jobs, as a planner is told them."""

from bench.workloads import WORKLOADS, Sizes, workload_of

SIZES = Sizes(
    rows=8, prompt_tokens=24, output_tokens=4, prefix_prompt_tokens=50, prefix_share=0.8, seed=0
)


def test_a_planner_is_told_what_prompts_begin_with_in_whole_pages() -> None:
    told = workload_of(WORKLOADS["prefix"](SIZES, 1000).requests)
    assert (told.num_rows, told.num_kept_once_tokens, told.mean_own_tokens) == (8, 32, 18)


def test_rows_that_begin_unlike_share_nothing() -> None:
    told = workload_of(WORKLOADS["ragged"](SIZES, 1000).requests)
    assert (told.num_rows, told.num_kept_once_tokens) == (8, 0)
