"""The planner by measured rates: what it chooses, that it is the best there is, and that it runs."""

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from bench.paper_models import OPT_6_7B, OPT_175B
from engine.config import Budgets
from engine.engine import Engine
from engine.errors import BudgetError, HardwareError
from engine.planning.cost import check_budgets, held_units, peak_bytes
from engine.planning.hardware import RateCurve
from engine.planning.machines import T4_208GB
from engine.planning.plan import make_plan
from engine.planning.planners import program
from engine.planning.planners.base import Situation, Wishes
from engine.planning.planners.candidates import (
    Away,
    Loads,
    candidates,
    fetched_otherwise,
    with_larger_chunks,
)
from engine.planning.planners.milp import _Search, plan_milp
from engine.planning.planners.program import Program
from engine.planning.policy import Policy, Split, Tier
from engine.planning.predict import predict, steady
from engine.planning.roofline import Model
from engine.planning.shape import ModelShape, leading_border_bytes, total_bytes
from engine.planning.units import UNIT_BYTES
from engine.planning.workload import Request, Workload
from tests.support.oracle import oracle_answer, ragged_prompts
from tests.support.situations import GIB, MACHINE, budgets_of, plain_shape, situation_of, work_of
from tests.support.tiny_models import write_tiny_model

SHAPE: Final = plain_shape(12)  # 192 MB of layers, 20 MB each of head and embedding
MIB: Final = 2**20
MANY: Final = Workload.uniform(60, 30, num_rows=400)


def model_of(situation: Situation, shape: ModelShape = SHAPE) -> Model:
    return Model(shape=shape, work=situation.work, hardware=situation.hardware)


@pytest.mark.parametrize("gpu_bytes", [0, 16 * GIB], ids=["cpu", "gpu"])
def test_everything_is_resident_where_the_model_and_its_rows_fit(gpu_bytes: int) -> None:
    budgets = budgets_of(gpu_bytes=gpu_bytes, host_bytes=64 * GIB)
    plan = make_plan(SHAPE, budgets, Wishes(situation=situation_of(SHAPE, MANY)))
    assert plan.policy.streamed_bytes == 0
    assert plan.policy.kv[plan.policy.compute] == plan.policy.kv.total_bytes
    assert plan.prediction.binding_lane == "compute"
    assert "all weights are resident" in plan.policy.reason
    assert "compute binds" in plan.policy.reason


def test_without_a_machine_there_is_no_plan() -> None:
    with pytest.raises(HardwareError, match="measured rates"):
        plan_milp(SHAPE, budgets_of(host_bytes=GIB), Wishes())


def alternatives(budgets: Budgets) -> list[Policy]:
    """The same share of every layer, for some blocks: what people would try, where it fits."""
    compute = Tier.GPU if budgets.gpu_bytes else Tier.CPU
    found = []
    for rows, share, kv_tier in itertools.product(
        (1, 4, 16, 64, 256), (0.0, 0.25, 0.5, 0.75, 1.0), (Tier.GPU, Tier.CPU)
    ):
        if compute is Tier.CPU and kv_tier is Tier.GPU:
            continue

        def split(tensors: Any, share: float = share) -> Split:
            total = total_bytes(tensors)
            kept = leading_border_bytes(tensors, int(share * total))
            if compute is Tier.CPU:
                return Split(gpu_bytes=0, cpu_bytes=kept, disk_bytes=total - kept)
            return Split(gpu_bytes=kept, cpu_bytes=total - kept, disk_bytes=0)

        policy = Policy(
            compute=compute,
            compute_dtype="float32",
            block_rows=rows,
            sweep_tokens=4 * rows,
            micro_batch_tokens=5 * rows,
            kv=Split.on(kv_tier, rows * 96 * SHAPE.kv_bytes_per_token),
            layer_splits=tuple(split(tensors) for tensors in SHAPE.layers),
            head_split=split(SHAPE.head_tensors),
            embedding_split=Split.on(Tier.DISK, SHAPE.embedding_tensors[0].num_bytes),
            reason="an alternative",
        )
        try:
            check_budgets(SHAPE, policy, budgets)
        except BudgetError:
            continue
        found.append(policy)
    return found


@pytest.mark.parametrize(
    "budgets",
    [
        budgets_of(host_bytes=280 * MIB),
        budgets_of(host_bytes=420 * MIB),
        budgets_of(gpu_bytes=160 * MIB, host_bytes=800 * MIB),
        budgets_of(gpu_bytes=320 * MIB, host_bytes=800 * MIB),
    ],
    ids=["little memory", "some memory", "little GPU memory", "some GPU memory"],
)
def test_no_alternative_is_predicted_to_do_better(budgets: Budgets) -> None:
    situation = situation_of(SHAPE, MANY)
    model = model_of(situation)
    chosen = plan_milp(SHAPE, budgets, Wishes(situation=situation))
    load, _, sweep_s = steady(model, chosen, MANY)
    rates = []
    for policy in alternatives(budgets):
        others, _, others_s = steady(model, policy, MANY)
        rates.append(others.rows / others_s)
    assert len(rates) >= 2
    assert load.rows / sweep_s >= 0.99 * max(rates)


RESOURCES: Final = ("gpu_bytes", "host_bytes", "disk_read", "gemm", "attention", "bus")


def richer(budgets: Budgets, situation: Situation, resource: str) -> tuple[Budgets, Situation]:
    if resource in {"gpu_bytes", "host_bytes"}:
        changed: dict[str, Any] = {resource: int(1.3 * getattr(budgets, resource))}
        return dataclasses.replace(budgets, **changed), situation
    machine = situation.hardware
    changes: dict[str, Any] = {
        "disk_read": {"disk_read": machine.disk_read.scaled(2)},
        "gemm": {"gemm": {name: curve.scaled(2) for name, curve in machine.gemm.items()}},
        "attention": {
            "attention_bytes_per_s": {
                kind: curve.scaled(2) for kind, curve in machine.attention_bytes_per_s.items()
            }
        },
        "bus": {"to_gpu_pinned_bytes_per_s": 20e9, "to_gpu_plain_bytes_per_s": 10e9},
    }
    hardware = dataclasses.replace(machine, **changes[resource])
    return budgets, dataclasses.replace(situation, hardware=hardware)


@settings(max_examples=6, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    mib=st.tuples(st.sampled_from([0, 160, 300]), st.integers(200, 600)),
    lengths=st.tuples(st.integers(5, 200), st.integers(2, 60)),
    resource=st.sampled_from(RESOURCES),
)
@example(mib=(300, 372), lengths=(5, 52), resource="host_bytes")
@example(mib=(300, 271), lengths=(78, 8), resource="disk_read")
@example(mib=(300, 459), lengths=(174, 44), resource="attention")
@example(mib=(160, 501), lengths=(51, 18), resource="disk_read")
def test_more_of_anything_never_predicts_less(
    mib: tuple[int, int], lengths: tuple[int, int], resource: str
) -> None:
    budgets = budgets_of(gpu_bytes=mib[0] * MIB, host_bytes=mib[1] * MIB)
    situation = situation_of(SHAPE, Workload.uniform(*lengths, num_rows=40))
    rates = []
    for its, told in ((budgets, situation), richer(budgets, situation, resource)):
        policy = plan_milp(SHAPE, its, Wishes(situation=told))
        check_budgets(SHAPE, policy, its)
        found = predict(model_of(told), policy, told.workload)
        rates.append(found.job_tokens_per_s)
    # Each block is placed for its steady state: its ramp or tail may be a little longer with more.
    assert rates[1] >= 0.99 * rates[0]


def test_a_job_that_is_short_for_its_block_is_placed_for_its_mean_sweep_too() -> None:
    """Ten rows of 10 + 10 tokens in a block of ten, prompts 64 a sweep: two sweeps of prompts, in the
    first of which six rows sample, then nine more until the last four have ended.
    """
    budgets = budgets_of(host_bytes=4 * GIB)
    situation = situation_of(SHAPE, Workload.uniform(10, 10, num_rows=10))
    wishes = Wishes(block_rows=10, sweep_tokens=64, situation=situation)
    steady_one = next(candidates(SHAPE, budgets, wishes))
    same, mean = Loads(situation).of(steady_one)
    assert same == steady_one
    assert mean.load.rows == pytest.approx(100 / 11)
    assert mean.load.prompt_tokens == pytest.approx(100 / 11)
    assert dataclasses.replace(mean, load=steady_one.load) == steady_one
    long = situation_of(SHAPE, Workload.uniform(10, 10, num_rows=40))
    assert Loads(long).of(steady_one) == [steady_one]


def test_a_short_job_that_streams_gets_its_prompts_into_fewer_sweeps() -> None:
    """As long as its rows are one block; of many blocks the chunk is what the steady state needs."""
    budgets = budgets_of(host_bytes=240 * MIB)
    short, long = (
        plan_milp(SHAPE, budgets, Wishes(block_rows=16, situation=situation_of(SHAPE, workload)))
        for workload in (Workload.uniform(64, 16, num_rows=rows) for rows in (16, 160))
    )
    assert short.streamed_bytes > 0
    assert long.sweep_tokens == 80  # 1.25 times 16 rows of 64 tokens over 16
    assert short.sweep_tokens in {2 * 80, 4 * 80, 8 * 80}


def test_larger_chunks_are_tried_with_the_best_rows_and_with_the_next_number_of_them() -> None:
    budgets = budgets_of(host_bytes=240 * MIB)
    wishes = Wishes(situation=situation_of(SHAPE, Workload.uniform(64, 16, num_rows=96)))

    def tried(block_rows: int) -> set[tuple[int, int]]:
        found = with_larger_chunks(SHAPE, budgets, wishes, block_rows=block_rows)
        return {(each.base.block_rows, each.base.sweep_tokens) for each in found}

    # The steady state of 91 rows needs 464 prompt tokens a sweep, that of 96 needs 480.
    of_all = {(96, times * 480) for times in (2, 4, 8)}
    assert tried(91) == {(91, times * 464) for times in (2, 4, 8)} | of_all
    assert tried(96) == of_all
    assert tried(4) == set()  # the job is twenty times as long as either block


@pytest.mark.parametrize("gpu_mib", [0, 160], ids=["cpu", "gpu"])
@pytest.mark.parametrize("host_mib", [220, 300, 600])
def test_what_is_rounded_is_about_as_fast_as_what_is_found_in_whole_numbers(
    gpu_mib: int, host_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    situation = situation_of(SHAPE, MANY)
    budgets = budgets_of(gpu_bytes=gpu_mib * MIB, host_bytes=host_mib * MIB)
    solved: list[bool] = []
    solve = program._solve

    def counted(*args: Any, whole: bool = True) -> Any:
        solved.append(whole)
        return solve(*args, whole=whole)

    monkeypatch.setattr(program, "_solve", counted)
    rounded = plan_milp(SHAPE, budgets, Wishes(situation=situation))
    in_whole_numbers = solved.count(True)
    monkeypatch.setattr(program, "_ROUNDED_GAP", -1.0)
    solved.clear()
    exact = plan_milp(SHAPE, budgets, Wishes(situation=situation))
    # Of a model this small a granule on a GPU is much of a sweep, and little can be rounded.
    assert in_whole_numbers <= solved.count(True) * (1.0 if gpu_mib else 0.5)
    model = model_of(situation)
    rates = [predict(model, each, MANY).job_tokens_per_s for each in (rounded, exact)]
    # Room for rounding is a percent or two of budgets this small; of a model of gigabytes it is nothing.
    assert rates[0] >= 0.97 * rates[1]


@pytest.mark.parametrize("rows", [8, 45, 96])
def test_no_short_job_is_faster_than_its_mean_sweep(rows: int) -> None:
    workload = Workload.of(
        [
            Request(num_prompt_tokens=own, num_output_tokens=new, max_output_tokens=new)
            for own, new in ((8, 40), (90, 4), (30, 16))
        ],
        num_rows=96,
    )
    situation = situation_of(SHAPE, workload)
    budgets = budgets_of(host_bytes=240 * MIB)
    search = _Search(model_of(situation), budgets, situation)
    policy = plan_milp(SHAPE, budgets, Wishes(block_rows=rows, situation=situation))
    rate = predict(model_of(situation), policy, workload).job_tokens_per_s
    if 4 * rows <= workload.num_rows:
        assert search._most_rate(policy) == math.inf
    else:
        assert rate <= search._most_rate(policy) <= 2 * rate


@pytest.mark.parametrize("gpu_mib", [0, 128], ids=["cpu", "gpu"])
def test_what_a_refusal_says_is_lacking_is_what_lacks(gpu_mib: int) -> None:
    wishes = Wishes(situation=situation_of(SHAPE, MANY))
    host_bytes = 64 * MIB if not gpu_mib else GIB
    budgets = budgets_of(gpu_bytes=gpu_mib // 4 * MIB, host_bytes=host_bytes)
    with pytest.raises(BudgetError) as refusal:
        plan_milp(SHAPE, budgets, wishes)
    message = str(refusal.value)
    tier = "gpu" if gpu_mib else "cpu"
    assert f"the {tier} tier needs" in message
    needed = int(re.findall(r"([\d,]+) bytes", message)[0].replace(",", ""))
    changed: dict[str, Any] = {"gpu_bytes" if gpu_mib else "host_bytes": needed}
    policy = plan_milp(SHAPE, dataclasses.replace(budgets, **changed), wishes)
    assert peak_bytes(SHAPE, policy)[Tier(tier)] <= needed


def test_a_slow_disk_is_worth_rows_and_a_fast_one_weights() -> None:
    """The break-even: with little to read in a second, more rows share each read."""
    budgets = budgets_of(host_bytes=260 * MIB)
    policies = [
        plan_milp(
            SHAPE,
            budgets,
            Wishes(situation=situation_of(SHAPE, MANY, disk_read=RateCurve.flat(rate))),
        )
        for rate in (1e8, 1e11)
    ]
    assert policies[0].streamed_bytes > 0
    assert policies[0].block_rows != policies[1].block_rows or (
        policies[0].streamed_bytes != policies[1].streamed_bytes
    )


def test_keys_and_values_are_attended_where_the_rates_say() -> None:
    budgets = budgets_of(gpu_bytes=330 * MIB, host_bytes=2 * GIB)
    long_rows = Workload.uniform(20, 400, num_rows=500)
    slow_cpu = {"cpu/float32": RateCurve.flat(1e8), "gpu/float32": RateCurve.flat(200e9)}
    fast_link = {"to_gpu_plain_bytes_per_s": 1e12, "attention_bytes_per_s": slow_cpu}
    fetched, beside = (
        plan_milp(SHAPE, budgets, Wishes(situation=situation_of(SHAPE, long_rows, **changes)))
        for changes in (fast_link, {"to_gpu_plain_bytes_per_s": 1e7})
    )
    assert fetched.kv.cpu_bytes > 0
    assert not fetched.attends_beside
    assert beside.attends_beside or not beside.kv.cpu_bytes


def test_a_large_model_is_a_small_program() -> None:
    shape = OPT_175B.shape
    situation = Situation(
        hardware=T4_208GB, work=OPT_175B.work, workload=Workload.uniform(512, 32, num_rows=1000)
    )
    budgets = budgets_of(
        gpu_bytes=T4_208GB.gpu_bytes,
        host_bytes=T4_208GB.host_bytes,
        disk_bytes=T4_208GB.disk_bytes,
    )
    program = Program(Model(shape=shape, work=OPT_175B.work, hardware=T4_208GB), budgets)
    assert program.num_columns <= 12
    assert sum(1 for _ in candidates(shape, budgets, Wishes(situation=situation))) < 300


LARGE: Final = plain_shape(4, columns=4000)  # layers of 256 MB


@pytest.mark.parametrize(
    "budgets",
    [budgets_of(host_bytes=400 * MIB), budgets_of(gpu_bytes=400 * MIB, host_bytes=4 * GIB)],
    ids=["cpu", "gpu"],
)
def test_layers_of_which_memory_holds_no_two_come_in_units(budgets: Budgets) -> None:
    situation = situation_of(LARGE, Workload.uniform(60, 30, num_rows=40))
    policy = plan_milp(LARGE, budgets, Wishes(situation=situation))
    check_budgets(LARGE, policy, budgets)
    assert policy.unit_bytes == UNIT_BYTES[policy.compute]
    assert policy.streamed_bytes > 0
    whole = dataclasses.replace(policy, unit_bytes=None, num_slots=2)
    with pytest.raises(BudgetError):
        check_budgets(LARGE, whole, budgets)


@pytest.mark.parametrize("gpu_bytes", [0, GIB], ids=["cpu", "gpu"])
def test_every_block_is_looked_at_with_layers_that_come_whole_and_otherwise(
    gpu_bytes: int,
) -> None:
    budgets = budgets_of(gpu_bytes=gpu_bytes, host_bytes=64 * GIB)
    situation = situation_of(LARGE, Workload.uniform(60, 30, num_rows=400))
    for whole in candidates(LARGE, budgets, Wishes(situation=situation)):
        cut = fetched_otherwise(LARGE, whole)
        assert cut is not None
        assert cut.base.unit_bytes == UNIT_BYTES[whole.base.compute]
        streamed = tuple(Split.on(Tier.DISK, num_bytes) for num_bytes in LARGE.layer_bytes)
        held = held_units(LARGE, dataclasses.replace(cut.base, layer_splits=streamed))
        is_one = not cut.base.may_cut_sweeps and whole.away is not Away.FETCHED
        assert cut.base.num_slots == (4 if is_one else held + 2)
        assert cut.away is (Away.NONE if is_one else whole.away)
    small = next(candidates(SHAPE, budgets, Wishes(situation=situation)))
    deeper = fetched_otherwise(SHAPE, small)
    assert deeper is not None
    assert (deeper.base.unit_bytes, deeper.base.num_slots) == (None, 4)
    whole_only = dataclasses.replace(
        LARGE, layers=((dataclasses.replace(LARGE.layers[0][0], is_whole=True),) * 4,) * 4
    )
    assert fetched_otherwise(whole_only, small) is None


def test_a_plan_says_what_would_help() -> None:
    budgets = budgets_of(host_bytes=220 * MIB)
    situation = situation_of(SHAPE, MANY, disk_read=RateCurve.flat(1e8))
    plan = make_plan(SHAPE, budgets, Wishes(situation=situation), with_sensitivities=True)
    assert plan.prediction.binding_lane == "disk"
    gains = {each.resource: each.gain for each in plan.sensitivities}
    assert gains["disk reads"] > 0.03
    assert gains["host memory"] > gains["disk reads"]
    assert min(gains.values()) >= -1e-9
    assert [each.gain for each in plan.sensitivities] == sorted(gains.values(), reverse=True)


def test_a_model_that_outgrows_its_gpu_has_its_rows_in_host_memory() -> None:
    situation = Situation(
        hardware=T4_208GB, work=OPT_6_7B.work, workload=Workload.uniform(512, 32, num_rows=2000)
    )
    budgets = budgets_of(gpu_bytes=15 * GIB, host_bytes=100 * GIB, disk_bytes=10**12)
    policy = plan_milp(OPT_6_7B.shape, budgets, Wishes(block_rows=200, situation=situation))
    assert policy.kv.cpu_bytes > 0
    check_budgets(OPT_6_7B.shape, policy, budgets)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_was_planned_is_what_runs(tmp_path: Path, name: str) -> None:
    """By the byte: a budget that lacks half of the layers, met, and the oracle's tokens."""
    folder = write_tiny_model(tmp_path / "model", name)
    prompts = ragged_prompts()

    def policy(shape: ModelShape, budgets: Budgets) -> Policy:
        situation = Situation(
            hardware=MACHINE, work=work_of(shape), workload=Workload.uniform(60, 60, num_rows=9)
        )
        wishes = Wishes(block_rows=6, situation=situation)
        roomy = plan_milp(shape, budgets, wishes)
        assert roomy.streamed_bytes == 0
        least = peak_bytes(shape, roomy)[Tier.CPU] - roomy.kv.cpu_bytes
        tight = dataclasses.replace(budgets, host_bytes=least - sum(shape.layer_bytes) // 2)
        found = plan_milp(shape, tight, wishes)
        check_budgets(shape, found, tight)
        return found

    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    with Engine.load(folder, budgets=budgets, policy=policy) as engine:
        found = {completion.key: completion for completion in engine.generate(prompts)}
        report = engine.report()
    assert engine.policy.streamed_bytes > 0
    most_bytes = report.num_sweeps * engine.policy.streamed_bytes
    if name == "mixtral":  # a sweep of few tokens fetches the experts that they are sent to
        assert 0 < report.weights_streamed_bytes <= most_bytes
    else:
        assert report.weights_streamed_bytes == most_bytes
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt in prompts:
        assert found[prompt.key].token_ids == oracle_answer(oracle, prompt)[0], prompt.key
