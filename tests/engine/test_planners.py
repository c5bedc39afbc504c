import contextlib
import dataclasses
import re
from itertools import accumulate
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import Budgets
from engine.errors import BudgetError
from engine.planning.cost import check_budgets, peak_bytes
from engine.planning.planners import PLANNERS
from engine.planning.planners.base import Planner, Wishes
from engine.planning.policy import Policy, Tier
from engine.planning.shape import ModelShape

GIB: Final = 2**30
SHAPE: Final = ModelShape(
    layer_tensor_bytes=((33_554_432,) * 4 + (90_177_536,) * 3 + (8192,) * 2,) * 32,
    outer_bytes=524_296_192,
    stored_itemsize=2,
    compute_itemsize=2,
    compute_dtype="bfloat16",
    kv_bytes_per_token=524_288,
    hidden_size=4096,
    intermediate_size=11_008,
    vocab_size=32_000,
    max_context_tokens=4096,
)

pytestmark = pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)


def budgets_of(*, gpu_bytes: int = 0, host_bytes: int, disk_bytes: int = 10**15) -> Budgets:
    return Budgets(
        gpu_bytes=gpu_bytes, host_bytes=host_bytes, disk_bytes=disk_bytes, spill_dir=Path("spill")
    )


SIZES: Final = st.integers(1, 200_000)
SHAPES: Final = st.builds(
    ModelShape,
    layer_tensor_bytes=st.lists(
        st.lists(SIZES, min_size=1, max_size=6).map(tuple), min_size=1, max_size=5
    ).map(tuple),
    outer_bytes=SIZES,
    stored_itemsize=st.sampled_from([1, 2, 4]),
    compute_itemsize=st.sampled_from([2, 4]),
    compute_dtype=st.just("float32"),
    kv_bytes_per_token=st.integers(1, 2000),
    hidden_size=st.integers(1, 64),
    intermediate_size=st.integers(1, 128),
    vocab_size=st.integers(2, 500),
    max_context_tokens=st.integers(1, 3000),
)
BUDGET_BYTES: Final = st.integers(0, 40_000_000) | st.integers(0, 10**10)
BUDGETS: Final = st.builds(
    Budgets,
    gpu_bytes=st.just(0) | BUDGET_BYTES,
    host_bytes=BUDGET_BYTES,
    disk_bytes=st.just(10**12) | BUDGET_BYTES,
    spill_dir=st.just(Path("spill")),
)
WISHES: Final = st.builds(
    Wishes,
    block_rows=st.none() | st.integers(1, 64),
    sweep_tokens=st.none() | st.integers(1, 512),
)


@given(shape=SHAPES, budgets=BUDGETS, wishes=WISHES)
def test_a_policy_keeps_every_budget_in_whole_tensors_or_the_refusal_has_the_numbers(
    planner: Planner, shape: ModelShape, budgets: Budgets, wishes: Wishes
) -> None:
    policy = plan_or_refusal(planner, shape, budgets, wishes)
    if isinstance(policy, str):
        assert re.search(r"the (gpu|cpu|disk) tier", policy)
        assert len(re.findall(r"[\d,]*\d bytes", policy)) >= 2
        return
    check_budgets(shape, policy, budgets)
    require_whole_tensors(shape, policy)
    assert policy.compute is (Tier.GPU if budgets.gpu_bytes else Tier.CPU)
    assert policy.compute_dtype == shape.compute_dtype
    assert policy.micro_batch_tokens >= 1
    assert policy.reason
    assert wishes.block_rows in (None, policy.block_rows)
    assert wishes.sweep_tokens in (None, policy.sweep_tokens)


def plan_or_refusal(
    planner: Planner, shape: ModelShape, budgets: Budgets, wishes: Wishes
) -> Policy | str:
    try:
        return planner(shape, budgets, wishes)
    except BudgetError as error:
        return str(error)


def require_whole_tensors(shape: ModelShape, policy: Policy) -> None:
    assert len(policy.layer_splits) == shape.num_layers
    for split, tensors in zip(policy.layer_splits, shape.layer_tensor_bytes, strict=True):
        borders = {0, *accumulate(tensors)}
        assert split.total_bytes == sum(tensors)
        assert split.gpu_bytes in borders
        assert split.gpu_bytes + split.cpu_bytes in borders
        assert policy.compute is Tier.GPU or split.gpu_bytes == 0


@pytest.mark.parametrize("compute", [Tier.GPU, Tier.CPU])
def test_nothing_is_streamed_where_everything_fits(planner: Planner, compute: Tier) -> None:
    wishes = Wishes(block_rows=4)
    everything = budgets_of(gpu_bytes=80 * GIB if compute is Tier.GPU else 0, host_bytes=80 * GIB)
    policy = planner(SHAPE, everything, wishes)
    assert policy.compute is compute
    assert policy.streamed_bytes == 0
    # Not only with room to spare: its own peak is a budget that it fits.
    peak = peak_bytes(SHAPE, policy)[compute]
    exact = budgets_of(gpu_bytes=peak if compute is Tier.GPU else 0, host_bytes=peak)
    assert planner(SHAPE, exact, wishes).streamed_bytes == 0


@pytest.mark.parametrize("compute", [Tier.GPU, Tier.CPU])
def test_less_memory_streams_more_until_a_refusal(planner: Planner, compute: Tier) -> None:
    streamed = []
    for gib in range(40, 1, -1):
        near = gib * GIB
        budgets = budgets_of(
            gpu_bytes=near if compute is Tier.GPU else 0,
            host_bytes=8 * GIB if compute is Tier.GPU else near,
        )
        with contextlib.suppress(BudgetError):
            streamed.append(planner(SHAPE, budgets, Wishes(block_rows=4)).streamed_bytes)
    assert len(streamed) > 30
    assert streamed == sorted(streamed)
    assert streamed[0] == 0 < streamed[-1]


def test_host_memory_takes_what_the_gpu_does_not_before_the_disk_does(planner: Planner) -> None:
    wishes = Wishes(block_rows=4)
    small, large = (
        planner(SHAPE, budgets_of(gpu_bytes=8 * GIB, host_bytes=gib * GIB), wishes)
        for gib in (4, 40)
    )
    assert sum(split.disk_bytes for split in large.layer_splits) == 0
    assert sum(split.disk_bytes for split in small.layer_splits) > 0
    assert large.streamed_bytes == small.streamed_bytes > 0


def test_a_refusal_names_the_tier_what_it_needs_and_what_it_has(planner: Planner) -> None:
    with pytest.raises(BudgetError, match=r"the cpu tier .* 1,048,576 bytes"):
        planner(SHAPE, budgets_of(host_bytes=2**20), Wishes())
    with pytest.raises(BudgetError, match=r"the gpu tier .* 2,097,152 bytes"):
        planner(SHAPE, budgets_of(gpu_bytes=2**21, host_bytes=80 * GIB), Wishes())


def test_a_disk_that_cannot_hold_what_is_streamed_is_refused(planner: Planner) -> None:
    with pytest.raises(BudgetError, match=r"the disk tier needs [\d,]+ bytes .* is 1,000 bytes"):
        planner(SHAPE, budgets_of(host_bytes=8 * GIB, disk_bytes=1000), Wishes(block_rows=4))


def test_a_plan_is_the_same_each_time(planner: Planner) -> None:
    budgets = budgets_of(gpu_bytes=8 * GIB, host_bytes=9 * GIB)
    first, second = (planner(SHAPE, budgets, Wishes()) for _ in range(2))
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
