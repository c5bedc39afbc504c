import contextlib
import dataclasses
import re
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
from engine.planning.planners.fixed import plan_fixed
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape, Placeable, leading_border_bytes, total_bytes
from tests.support.situations import budgets_of, situation_of

GIB: Final = 2**30
TABLE: Final = Placeable(num_bytes=262_144_000, granule_bytes=262_144)
SHAPE: Final = ModelShape(
    layers=(
        (Placeable(num_bytes=33_554_432, granule_bytes=262_144),) * 4
        + (Placeable(num_bytes=90_177_536, granule_bytes=262_144),) * 3,
    )
    * 32,
    fixed_bytes=532_480,
    embedding=TABLE,
    head=TABLE,
    tied=False,
    scales_logits=False,
    compute_dtype="bfloat16",
    compute_itemsize=2,
    kv_bytes_per_token=524_288,
    hidden_size=4096,
    intermediate_size=11_008,
    vocab_size=32_000,
    max_context_tokens=4096,
)


def situated(planner: Planner) -> Planner:
    """The planner, told of a machine and of some short rows."""

    def plan(shape: ModelShape, budgets: Budgets, wishes: Wishes) -> Policy:
        told = dataclasses.replace(wishes, situation=situation_of(shape))
        return planner(shape, budgets, told)

    return plan


every_planner = pytest.mark.parametrize(
    "planner", [situated(each) for each in PLANNERS.values()], ids=PLANNERS
)
by_fixed_rules = pytest.mark.parametrize("planner", [plan_fixed], ids=["fixed"])


PLACEABLES: Final = st.builds(
    lambda granule, count, over, unpacked: Placeable(
        num_bytes=granule * count + over % granule,
        granule_bytes=granule,
        unpacked_bytes=unpacked,
    ),
    st.integers(1, 20_000),
    st.integers(1, 30),
    st.integers(0, 20_000),
    st.just(0) | st.integers(1, 400_000),
)
SHAPES: Final = st.builds(
    ModelShape,
    layers=st.lists(
        st.lists(PLACEABLES, min_size=1, max_size=6).map(tuple), min_size=1, max_size=5
    ).map(tuple),
    fixed_bytes=st.integers(0, 200_000),
    embedding=st.none() | PLACEABLES,
    head=st.none() | PLACEABLES,
    tied=st.booleans(),
    scales_logits=st.booleans(),
    compute_dtype=st.just("float32"),
    compute_itemsize=st.just(4),
    kv_bytes_per_token=st.integers(1, 2000),
    hidden_size=st.integers(1, 64),
    intermediate_size=st.integers(1, 128),
    vocab_size=st.integers(2, 500),
    max_context_tokens=st.integers(1, 3000),
    lookup_bytes_per_token=st.just(0) | st.integers(1, 3000),
    widened_bytes_per_token=st.just(0) | st.integers(1, 3000),
)
# Libraries, scratch and slack come to some 110 MiB whatever the model.
BUDGET_BYTES: Final = st.integers(0, 300_000_000) | st.integers(0, 10**10)
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


@every_planner
@given(shape=SHAPES, budgets=BUDGETS, wishes=WISHES)
def test_a_policy_keeps_every_budget_in_whole_rows_or_the_refusal_has_the_numbers(
    planner: Planner, shape: ModelShape, budgets: Budgets, wishes: Wishes
) -> None:
    policy = plan_or_refusal(planner, shape, budgets, wishes)
    if isinstance(policy, str):
        assert re.search(r"the (gpu|cpu|disk) tier", policy)
        assert len(re.findall(r"[\d,]*\d bytes", policy)) >= 2
        return
    check_budgets(shape, policy, budgets)
    require_legal_borders(shape, policy)
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


def require_legal_borders(shape: ModelShape, policy: Policy) -> None:
    assert len(policy.layer_splits) == shape.num_layers
    placed = [
        *zip(policy.layer_splits, shape.layers, strict=True),
        (policy.head_split, shape.head_tensors),
        (policy.embedding_split, shape.embedding_tensors),
    ]
    for split, tensors in placed:
        if split is None:
            continue
        assert split.total_bytes == total_bytes(tensors)
        for border in (split.gpu_bytes, split.gpu_bytes + split.cpu_bytes):
            assert leading_border_bytes(tensors, border) == border
        assert policy.compute is Tier.GPU or split.gpu_bytes == 0


@by_fixed_rules
def test_the_embedding_leaves_memory_before_anything_is_streamed(planner: Planner) -> None:
    wishes = Wishes(block_rows=4)
    capped = dataclasses.replace(SHAPE, max_context_tokens=256)
    roomy = planner(capped, budgets_of(host_bytes=80 * GIB), wishes)
    just_less = budgets_of(host_bytes=peak_bytes(capped, roomy)[Tier.CPU] - 1)
    policy = planner(capped, just_less, wishes)
    assert policy.streamed_bytes == 0
    assert policy.embedding_split is not None
    assert policy.embedding_split.disk_bytes == TABLE.num_bytes
    assert policy.kv == roomy.kv


@by_fixed_rules
def test_the_head_is_resident_before_any_part_of_a_layer_is(planner: Planner) -> None:
    wishes = Wishes(block_rows=4)
    seen = set()
    for host_bytes in range(GIB // 4, 4 * GIB, GIB // 32):
        with contextlib.suppress(BudgetError):
            policy = planner(SHAPE, budgets_of(host_bytes=host_bytes), wishes)
            assert policy.head_split is not None
            shares = [split.cpu_bytes / split.total_bytes for split in policy.layer_splits]
            assert max(shares) < min(shares) + 0.01
            assert policy.head_split.disk_bytes == 0 or max(shares) == 0
            seen.add((policy.head_split.disk_bytes > 0, max(shares) > 0))
    assert seen >= {(True, False), (False, True)}


@every_planner
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


@by_fixed_rules
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


@every_planner
def test_host_memory_takes_what_the_gpu_does_not_before_the_disk_does(planner: Planner) -> None:
    wishes = Wishes(block_rows=4)
    small, large = (
        planner(SHAPE, budgets_of(gpu_bytes=8 * GIB, host_bytes=gib * GIB), wishes)
        for gib in (4, 40)
    )
    assert sum(split.disk_bytes for split in large.layer_splits) == 0
    assert sum(split.disk_bytes for split in small.layer_splits) > 0
    # One may have whole layers and the other units, of which slots take more or less.
    assert large.streamed_bytes == pytest.approx(small.streamed_bytes, rel=0.02)
    assert large.streamed_bytes > 0


@every_planner
def test_a_refusal_names_the_tier_what_it_needs_and_what_it_has(planner: Planner) -> None:
    with pytest.raises(BudgetError, match=r"the cpu tier .* 1,048,576 bytes"):
        planner(SHAPE, budgets_of(host_bytes=2**20), Wishes())
    with pytest.raises(BudgetError, match=r"the gpu tier .* 2,097,152 bytes"):
        planner(SHAPE, budgets_of(gpu_bytes=2**21, host_bytes=80 * GIB), Wishes())


@every_planner
def test_a_disk_that_cannot_hold_what_is_streamed_is_refused(planner: Planner) -> None:
    with pytest.raises(BudgetError, match=r"the disk tier needs [\d,]+ bytes .* is 1,000 bytes"):
        planner(SHAPE, budgets_of(host_bytes=8 * GIB, disk_bytes=1000), Wishes(block_rows=4))


@every_planner
def test_a_plan_is_the_same_each_time(planner: Planner) -> None:
    budgets = budgets_of(gpu_bytes=8 * GIB, host_bytes=9 * GIB)
    first, second = (planner(SHAPE, budgets, Wishes()) for _ in range(2))
    assert dataclasses.asdict(first) == dataclasses.asdict(second)


@by_fixed_rules
def test_keys_and_values_that_are_fetched_to_a_gpu_are_staged_in_host_memory(
    planner: Planner,
) -> None:
    policy = planner(SHAPE, budgets_of(gpu_bytes=8 * GIB, host_bytes=40 * GIB), Wishes())
    away = dataclasses.replace(policy, kv=Split.on(Tier.CPU, GIB), attends_beside=True)
    beside = peak_bytes(SHAPE, away)
    fetched = peak_bytes(SHAPE, dataclasses.replace(away, attends_beside=False))
    staged_bytes = fetched[Tier.CPU] - beside[Tier.CPU]
    assert staged_bytes == fetched[Tier.GPU] - beside[Tier.GPU] > 0
