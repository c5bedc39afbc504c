"""Each term of the cost model beside a calculation by hand, and FlexGen's own beside its vectors."""

import dataclasses
import math

import pytest

from bench.paper_models import OPT_30B
from engine.errors import HardwareError, WorkloadError
from engine.planning import roofline
from engine.planning.hardware import Hardware, RateCurve
from engine.planning.job import simulate
from engine.planning.load import Load, kept_tokens, load_of, steady_load
from engine.planning.machines import MACHINES, T4_208GB_AS_FLEXGEN
from engine.planning.policy import Policy, Split, Tier
from engine.planning.predict import predict
from engine.planning.roofline import Model
from engine.planning.sweep import Sweep
from engine.planning.workload import Request, Workload
from tests.support import flexgen
from tests.support.situations import MACHINE, plain_shape, work_of

SHAPE = plain_shape(4)
MODEL = Model(shape=SHAPE, work=work_of(SHAPE), hardware=MACHINE)
MIB = 2**20


def policy_of(resident: float = 1.0, *, compute: Tier = Tier.CPU, **changes: object) -> Policy:
    kept = int(resident * 4 * 4_000_000)
    split = Split.on(compute, kept)
    split = dataclasses.replace(split, disk_bytes=16_000_000 - kept)
    policy = Policy(
        compute=compute,
        compute_dtype="float32",
        block_rows=100,
        sweep_tokens=1000,
        micro_batch_tokens=10_000,
        kv=Split.on(compute, 10**9),
        layer_splits=(split,) * 4,
        reason="by hand",
    )
    return dataclasses.replace(policy, **changes)  # type: ignore[arg-type]


def decoding(rows: float, *, context: float = 500.0) -> Load:
    return Load(
        rows=rows,
        prompt_tokens=0.0,
        live_tokens=rows * context,
        context_tokens=context,
        prompt_pairs=0.0,
        prompt_length=1.0,
    )


# -- data ----------------------------------------------------------------------------------


def test_a_rate_between_two_sizes_lies_on_a_line_in_logarithms() -> None:
    curve = RateCurve(((10.0, 100.0), (1000.0, 10_000.0)))
    assert curve.at(100) == pytest.approx(1000.0)
    assert [curve.at(size) for size in (1, 10, 1000, 10**9)] == [100, 100, 10_000, 10_000]


@pytest.mark.parametrize(
    "points", [(), ((1.0, 0.0),), ((2.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 2.0))]
)
def test_a_curve_that_cannot_be_is_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(HardwareError, match="rising"):
        RateCurve(points)


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_comes_back_from_json(name: str) -> None:
    assert Hardware.from_json(MACHINES[name].to_json()) == MACHINES[name]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"gpu_bytes"', '"gpu_byte"', "no field gpu_byte"),
        ('"version": 3', '"version": 2', "version 3, this one 2"),
        ('"host_bytes": 68719476736', '"host_bytes": "much"', "host_bytes cannot be 'much'"),
        ('  "disk_bytes": 1000000000000,\n', "", "lacks disk_bytes"),
        ("{", "[", "not"),
    ],
)
def test_a_machine_that_cannot_be_read_is_refused_by_name(old: str, new: str, message: str) -> None:
    text = MACHINE.to_json()
    assert old in text
    with pytest.raises(HardwareError, match=message):
        Hardware.from_json(text.replace(old, new, 1))


def test_a_rate_that_was_not_measured_is_asked_for_by_name() -> None:
    with pytest.raises(HardwareError, match=r"cpu/bfloat16, cpu/float32.*gpu/float64 is needed"):
        MACHINE.gemm_flops_per_s("gpu", "float64", 1)


def test_long_rows_are_seen_more_often_than_they_come() -> None:
    short = Request(num_prompt_tokens=100, num_output_tokens=10, max_output_tokens=10)
    long = Request(num_prompt_tokens=200, num_output_tokens=90, max_output_tokens=90)
    workload = Workload.of([short, long])
    assert workload.num_rows == 2
    assert workload.mean_live_tokens == pytest.approx((10 * 105 + 90 * 245) / 100)
    assert workload.prompt_tokens_per_output == pytest.approx(300 / 100)
    assert workload.quantile(lambda each: each.num_prompt_tokens, 0.5) == 100
    assert workload.quantile(lambda each: each.num_prompt_tokens, 0.51) == 200


@pytest.mark.parametrize(
    "lengths", [(0, 0, 1), (5, 5, 1), (5, 0, 0)], ids=["no prompt", "nothing own", "no output"]
)
def test_rows_that_cannot_be_are_refused(lengths: tuple[int, int, int]) -> None:
    prompt, shared, output = lengths
    with pytest.raises(WorkloadError, match="no row"):
        Request(
            num_prompt_tokens=prompt,
            num_shared_tokens=shared,
            num_output_tokens=output,
            max_output_tokens=max(1, output),
        )


# -- what a sweep carries ------------------------------------------------------------------


def test_in_steady_state_prompts_come_in_as_fast_as_rows_leave() -> None:
    workload = Workload.uniform(512, 32, num_rows=1000)
    load = steady_load(workload, rows=64, sweep_tokens=4096)
    assert (load.rows, load.prompt_tokens) == (64, 1024)
    assert load.live_tokens == 64 * 528
    starved = steady_load(workload, rows=64, sweep_tokens=512)
    assert (starved.rows, starved.prompt_tokens) == (32, 512)


def test_shared_tokens_are_computed_and_kept_once() -> None:
    request = Request(
        num_prompt_tokens=512, num_shared_tokens=480, num_output_tokens=32, max_output_tokens=32
    )
    load = steady_load(Workload.of([request]), rows=64, sweep_tokens=4096)
    assert load.prompt_tokens == 64
    assert load.live_tokens == 64 * 48 + 480
    assert load.prompt_pairs == pytest.approx(480 + 33 / 2)


def test_a_row_takes_the_room_that_the_block_gives_it() -> None:
    # 100 + 32 tokens first, then doubled to the limit of 300: pages of 16 make 144 and 304.
    workload = Workload.uniform(100, 200, num_rows=10)
    assert kept_tokens(workload, rows=1) == pytest.approx((32 * 144 + 132 * 272 + 36 * 304) / 200)


# -- terms ---------------------------------------------------------------------------------


def test_streamed_bytes_are_read_at_the_rate_of_their_size() -> None:
    slow = dataclasses.replace(MACHINE, disk_read=RateCurve(((1e6, 1e8), (1e8, 1e9))))
    assert roofline.disk_read_s(slow, 1e9, unit_bytes=1e6) == pytest.approx(10.0)
    assert roofline.disk_read_s(slow, 1e9, unit_bytes=1e9) == pytest.approx(1.0)


def test_products_are_costed_at_a_micro_batchs_rows() -> None:
    assert roofline.gemm_s(MODEL, policy_of(), decoding(100), layer=0) == pytest.approx(
        2 * 4_000_000 * 100 / 1e11
    )
    cut = policy_of(micro_batch_tokens=10)
    assert roofline.gemm_s(MODEL, cut, decoding(100), layer=0) == pytest.approx(
        2 * 4_000_000 * 100 / (1e10 * math.sqrt(10))
    )


def test_an_expert_is_costed_at_the_tokens_that_it_meets() -> None:
    work = dataclasses.replace(MODEL.work, expert_elements=(4_000_000,) * 4, expert_share=0.01)
    model = dataclasses.replace(MODEL, work=work)
    assert roofline.gemm_s(model, policy_of(), decoding(100), layer=0) == pytest.approx(
        2 * 4_000_000 * 100 / 1e10
    )


def test_what_lies_between_products_goes_by_their_inputs_and_outputs() -> None:
    work = dataclasses.replace(MODEL.work, layer_values=(0, 18_000, 0, 0))
    model = dataclasses.replace(MODEL, work=work)
    seconds = [
        roofline.elementwise_s(model, policy_of(), decoding(100), layer=layer) for layer in (0, 1)
    ]
    assert seconds == pytest.approx([0.0, 100 * 18_000 * 4 / 10e9])
    none = Sweep(MODEL, policy_of()).seconds(decoding(100), kept_tokens=0)
    some = Sweep(model, policy_of()).seconds(decoding(100), kept_tokens=0)
    assert some == pytest.approx(none + seconds[1])


def test_decoding_attention_reads_all_that_is_live_within_the_window() -> None:
    work = dataclasses.replace(MODEL.work, windows=(None, 125, None, None))
    model = dataclasses.replace(MODEL, work=work)
    seconds = [
        roofline.attention_s(
            model, policy_of(), decoding(100), layer=layer, tier=Tier.CPU, share=1.0
        )
        for layer in (0, 1)
    ]
    assert seconds == pytest.approx([50_000 * 8000 / 10e9, 12_500 * 8000 / 10e9])


def test_attention_goes_at_the_rate_of_its_dtype_and_of_the_heads_to_a_key() -> None:
    curve = RateCurve(((1.0, 8e9), (4.0, 2e9)))
    rates = {"cpu/float32": curve, "cpu/bfloat16": RateCurve.flat(5e9)}
    model = dataclasses.replace(
        MODEL, hardware=dataclasses.replace(MACHINE, attention_bytes_per_s=rates)
    )
    grouped = dataclasses.replace(
        model, work=dataclasses.replace(model.work, num_heads=40), shape=SHAPE
    )

    def seconds(its: Model, dtype: str) -> float:
        return roofline.attention_s(
            its,
            policy_of(compute_dtype=dtype),
            decoding(100),
            layer=0,
            tier=Tier.CPU,
            share=1.0,
        )

    live = 50_000 * 8000
    assert seconds(model, "float32") == pytest.approx(live / 8e9)
    assert seconds(grouped, "float32") == pytest.approx(live / 2e9)
    assert seconds(grouped, "bfloat16") == pytest.approx(live / 5e9)
    with pytest.raises(HardwareError, match="cpu/float16 is needed"):
        seconds(model, "float16")


def test_a_head_is_computed_in_float32_on_a_cpu_whatever_layers_are() -> None:
    rates = dict(MACHINE.gemm) | {"cpu/bfloat16": RateCurve.flat(1e9)}
    model = dataclasses.replace(MODEL, hardware=dataclasses.replace(MACHINE, gemm=rates))
    policy = policy_of(compute_dtype="bfloat16")
    assert roofline.head_s(model, policy, decoding(100)) == pytest.approx(2 * 5e6 * 100 / 1e11)
    assert roofline.head_expand_s(model, policy, decoding(100)) == pytest.approx(2e7 / 5e9)
    assert roofline.head_expand_s(MODEL, policy_of(), decoding(100)) == 0.0


def test_each_prompt_and_each_expert_that_has_tokens_costs_something_in_each_layer() -> None:
    machine = dataclasses.replace(
        MACHINE, layer_overhead_s=1e-3, prompt_layer_overhead_s=1e-4, expert_overhead_s=1e-2
    )
    work = dataclasses.replace(
        MODEL.work, expert_elements=(4_000_000, 0, 0, 0), expert_share=0.25, num_experts=8
    )
    model = dataclasses.replace(MODEL, hardware=machine, work=work)
    load = dataclasses.replace(decoding(1), prompt_tokens=3.0, prompt_length=0.5)
    cut = policy_of(micro_batch_tokens=2)
    # Four tokens in two micro-batches: two tokens of each meet 8 * (1 - 0.75**2) experts.
    in_experts = 2 * 8 * (1 - 0.75**2) * 1e-2
    dense = 2 * 1e-3

    def overhead_s(model: Model, layer: int) -> float:
        return roofline.overhead_s(
            model, cut, load, layer=layer, num_units=3, read_s=0.5, fetched_s=0.4
        )

    assert overhead_s(model, 0) == pytest.approx(dense + in_experts)
    assert overhead_s(model, 1) == pytest.approx(dense)
    products = dataclasses.replace(work, layer_products=(5, 4, 4, 4), expert_products=(2, 0, 0, 0))
    machine = dataclasses.replace(
        machine,
        product_overhead_s=1e-5,
        unit_overhead_s=1e-4,
        lost_beside_reads=0.1,
        lost_beside_fetches=0.2,
    )
    model = dataclasses.replace(model, hardware=machine, work=products)
    more_s = 3 * 1e-4 + 0.1 * 0.5 + 0.2 * 0.4 + 2 * (5 + 8 * (1 - 0.75**2) * 2) * 1e-5
    assert overhead_s(model, 0) == pytest.approx(dense + in_experts + more_s)
    attended = [
        roofline.attention_s(each, cut, load, layer=1, tier=Tier.CPU, share=1.0)
        for each in (model, MODEL)
    ]
    # Three tokens of prompts of half a token each, which count as three prompts at most.
    assert attended[0] - attended[1] == pytest.approx(3 * 1e-4)


def test_stored_weights_are_expanded_once_for_each_micro_batch() -> None:
    tensors = tuple(
        dataclasses.replace(tensor, stored_dtype="bfloat16") for tensor in SHAPE.layers[0]
    )
    thrice, load = policy_of(micro_batch_tokens=34), decoding(100)
    for share in (0.0, 1.0):
        found = roofline.expand_s(MODEL, thrice, load, tensors, streamed_share=share)
        assert found == pytest.approx(3 * 16e6 / 5e9)
        same = roofline.expand_s(MODEL, thrice, load, SHAPE.layers[0], streamed_share=share)
        assert same == 0.0


def _laying_out(**changes: object) -> Model:
    """Where weights in compute dtype are laid out too, the slower the more rows there are."""
    rates = {
        **MACHINE.expand_bytes_per_s,
        "cpu/float32->float32": RateCurve(((1.0, 8e9), (100.0, 4e9))),
    }
    hardware = dataclasses.replace(MACHINE, expand_bytes_per_s=rates)
    work = dataclasses.replace(MODEL.work, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(MODEL, hardware=hardware, work=work)


def test_streamed_weights_are_laid_out_where_that_takes_time() -> None:
    model, policy = _laying_out(), policy_of()
    for share in (0.0, 0.5):
        found = roofline.expand_s(
            model, policy, decoding(100), SHAPE.layers[0], streamed_share=share
        )
        assert found == pytest.approx(share * 16e6 / 4e9)
    assert roofline.head_expand_s(model, policy, decoding(100)) == pytest.approx(2e7 / 4e9)


def test_experts_are_laid_out_wherever_they_are_and_as_many_as_have_tokens() -> None:
    model = _laying_out(expert_elements=(4_000_000, 0, 0, 0), expert_share=0.01, num_experts=200)
    stacks = tuple(dataclasses.replace(tensor, is_stack=True) for tensor in SHAPE.layers[0])
    found = roofline.expand_s(model, policy_of(), decoding(100), stacks, streamed_share=0.0)
    # A hundred tokens at two each of 200: one row for each expert that has any.
    assert found == pytest.approx((1 - 0.99**100) * 16e6 / 8e9)


def test_what_takes_fewer_bytes_in_compute_dtype_stays_ready() -> None:
    """A float32 weight that bfloat16 is computed from is kept as bfloat16; the other way round it is
    not."""
    rates = {"cpu/float32->bfloat16": RateCurve.flat(4e9)}
    model = dataclasses.replace(
        MODEL,
        hardware=dataclasses.replace(MACHINE, expand_bytes_per_s=rates),
        shape=dataclasses.replace(SHAPE, compute_itemsize=2),
    )
    policy = policy_of(compute_dtype="bfloat16")
    wide = (dataclasses.replace(SHAPE.layers[0][0], stored_dtype="float32"),)
    for share in (0.0, 0.5):
        found = roofline.expand_s(model, policy, decoding(100), wide, streamed_share=share)
        assert found == pytest.approx(share * 4e6 / 4e9)


def test_prompts_attend_at_the_rate_of_their_length_where_that_is_known() -> None:
    load = dataclasses.replace(
        decoding(0), prompt_tokens=64.0, prompt_length=64.0, prompt_pairs=32.5
    )
    machine = dataclasses.replace(MACHINE, prompt_flops_per_s={"cpu/float32": RateCurve.flat(2e9)})
    model = dataclasses.replace(MODEL, hardware=machine)
    found = roofline.attention_s(model, policy_of(), load, layer=0, tier=Tier.CPU, share=1.0)
    assert found == pytest.approx(MODEL.work.attention_flops(1) * 32.5 * 64 / 2e9)


def test_rows_live_on_the_fastest_tier_that_has_room() -> None:
    kv = Split(gpu_bytes=32_000_000, cpu_bytes=0, disk_bytes=10**12)
    shares = roofline.kv_shares(MODEL, policy_of(kv=kv), kept_tokens=4000)
    assert shares == pytest.approx({Tier.GPU: 0.25, Tier.CPU: 0.0, Tier.DISK: 0.75})


def test_on_a_gpu_answers_come_back_or_keys_and_values_are_fetched() -> None:
    away = policy_of(compute=Tier.GPU, kv=Split.on(Tier.CPU, 10**9))
    shares = {Tier.GPU: 0.0, Tier.CPU: 1.0, Tier.DISK: 0.0}
    to_gpu, from_gpu = roofline.moved_s(MODEL, away, decoding(100), shares, layer=0)
    assert to_gpu == pytest.approx(100 * 1000 * 4 / 5e9)
    assert from_gpu == pytest.approx((100 * 8000 + 100 * 1000 * 4) / 8e9)
    fetched = dataclasses.replace(away, attends_beside=False)
    to_gpu, from_gpu = roofline.moved_s(MODEL, fetched, decoding(100), shares, layer=0)
    assert to_gpu == pytest.approx(50_000 * 8000 / 5e9)
    assert from_gpu == pytest.approx(100 * 8000 / 8e9)


# -- a sweep -------------------------------------------------------------------------------


def test_the_slower_of_reading_and_computing_bounds_a_sweep() -> None:
    # 64 MB of layers at 1 GB/s; 16M elements by 100 rows, at 100 GFLOP/s; 5M of the head.
    terms = Sweep(MODEL, policy_of(0.0)).terms(decoding(100, context=1), kept_tokens=0)
    assert terms.disk_read_s == pytest.approx(0.064)
    busy = Sweep(MODEL, policy_of(0.0)).busy(decoding(100, context=1), kept_tokens=0)
    assert busy == dataclasses.replace(terms, bubble_s=0.0)
    assert terms.gemm_s == pytest.approx(0.032)
    assert terms.head_s == pytest.approx(0.01)
    assert Sweep(MODEL, policy_of(0.0)).seconds(
        decoding(100, context=1), kept_tokens=0
    ) == pytest.approx(0.064)
    waiting = policy_of(0.0, overlap=False)
    both = Sweep(MODEL, waiting).seconds(decoding(100, context=1), kept_tokens=0)
    assert both == pytest.approx(0.064 + 0.032 + 0.01 + terms.attention_s)


def test_a_unit_is_read_at_the_rate_of_its_own_size() -> None:
    """Layers of 16 MB: in units of 4 MB, each of a matrix, or whole."""
    slow = dataclasses.replace(MACHINE, disk_read=RateCurve(((4e6, 5e8), (16e6, 1e9))))
    model = dataclasses.replace(MODEL, hardware=slow)
    whole = policy_of(0.0)
    cut = policy_of(0.0, unit_bytes=4_000_000, num_slots=4)
    for policy, rate in ((whole, 1e9), (cut, 5e8)):
        terms = Sweep(model, policy).terms(decoding(1), kept_tokens=0)
        assert terms.disk_read_s == pytest.approx(64e6 / rate)


def test_units_that_several_micro_batches_hold_hide_less_behind_them() -> None:
    """One micro-batch gives its units back as it goes; of several the last one does."""

    def bubble_s(tokens: int, num_slots: int) -> float:
        policy = policy_of(
            0.0, unit_bytes=4_000_000, num_slots=num_slots, micro_batch_tokens=tokens
        )
        return Sweep(MODEL, policy).terms(decoding(100, context=1), kept_tokens=0).bubble_s

    # A layer's four units; one slot to spare, and one ahead or four.
    assert bubble_s(100, 6) == pytest.approx(0.0)
    assert bubble_s(10, 6) > 0.02
    assert bubble_s(10, 9) == pytest.approx(0.0)


# -- a job ---------------------------------------------------------------------------------


def test_a_job_fills_runs_and_drains() -> None:
    """Eight rows of 10 + 3 tokens, four at a time, 20 prompt tokens a sweep: two rows start in each
    sweep, so sweeps carry 2, 4, 4, 4, 4, 2 rows, and the last two start in the fourth.
    """
    workload = Workload.uniform(10, 3, num_rows=8)
    seen: list[tuple[float, float]] = []

    def seconds(load: Load) -> float:
        seen.append((load.rows, load.prompt_tokens))
        return 1.0

    job = simulate(
        workload, block_rows=4, sweep_tokens=20, seconds=seconds, steady_tokens_per_s=1.0
    )
    assert job.num_tokens == 24
    assert job.job_s == 7.0
    assert job.startup_s == 1.0
    assert job.tail_s == 3.0
    assert set(seen) >= {(2, 20), (4, 20)}


def test_the_middle_of_a_long_job_passes_at_the_steady_rate() -> None:
    workload = Workload.uniform(10, 10, num_rows=10**6)
    job = simulate(
        workload,
        block_rows=10,
        sweep_tokens=100,
        seconds=lambda load: 1.0,
        steady_tokens_per_s=10.0,
    )
    assert job.num_tokens == pytest.approx(10**7)
    assert job.job_s == pytest.approx(10**6, rel=0.001)


def test_steady_state_and_a_long_job_agree() -> None:
    workload = Workload.uniform(100, 50, num_rows=100_000)
    policy = policy_of(0.5, block_rows=40, sweep_tokens=200)
    found = predict(MODEL, policy, workload)
    assert found.num_rows == 40
    assert found.job_tokens_per_s == pytest.approx(found.tokens_per_s, rel=0.02)
    assert found.latency_s == pytest.approx(50 * found.sweep_s)
    assert sum(found.terms.as_dict()[name] for name in ("gemm_s", "head_s")) <= found.sweep_s


def test_keys_and_values_bound_how_many_rows_run() -> None:
    workload = Workload.uniform(100, 10, num_rows=100_000)
    kept = kept_tokens(workload, rows=7)
    room = Split.on(Tier.CPU, int(kept * SHAPE.kv_bytes_per_token) + 1)
    assert predict(MODEL, policy_of(kv=room), workload).num_rows == pytest.approx(7, abs=0.01)


# -- FlexGen -------------------------------------------------------------------------------

CASE_30B = flexgen.Case(
    num_layers=48,
    hidden=7168,
    prompt=512,
    generated=32,
    gpu_batch=48,
    num_gpu_batches=3,
    weights=(0.2, 0.8),
    kv=(0.0, 1.0),
)
CASE_175B = dataclasses.replace(
    CASE_30B,
    num_layers=96,
    hidden=12288,
    gpu_batch=32,
    num_gpu_batches=8,
    weights=(0.0, 0.5),
    kv=(0.0, 0.0),
)


def test_flexgens_formulas_give_its_worked_vectors() -> None:
    first, then = flexgen.prefill(CASE_30B), flexgen.decode(CASE_30B)
    assert [first[name] for name in ("ctog", "gtoc", "comp")] == pytest.approx(
        [0.148, 2.238, 4.389], abs=0.0006
    )
    assert [then[name] for name in ("ctog", "gtoc", "gpu", "cpu")] == pytest.approx(
        [0.0714, 0.0004, 0.0413, 0.1797], abs=0.0001
    )
    assert flexgen.seconds(CASE_30B) == pytest.approx(645.8, abs=0.1)
    assert flexgen.tokens_per_s(CASE_30B) == pytest.approx(7.14, abs=0.005)
    first, then = flexgen.prefill(CASE_175B), flexgen.decode(CASE_175B)
    names = ("ctog", "gtoc", "dtoc", "ctod", "comp")
    assert [first[name] for name in names] == pytest.approx(
        [0.495, 6.820, 3.568, 8.059, 22.694], abs=0.001
    )
    assert [then[name] for name in ("ctog", "dtoc", "comp")] == pytest.approx(
        [0.2623, 16.837, 0.7742], abs=0.001
    )
    assert flexgen.seconds(CASE_175B) == pytest.approx(53_066, abs=2)


def test_our_terms_of_a_decoding_sweep_are_flexgens_at_its_rates() -> None:
    """The case of OPT-30B, a sweep without prompts: products, weights over the bus, attention on
    the CPU, without the factor by which FlexGen slows small batches there.
    """
    layer_bytes = OPT_30B.shape.layer_bytes[0]
    near = round(0.2 * layer_bytes)
    policy = policy_of(
        compute=Tier.GPU,
        compute_dtype="float16",
        micro_batch_tokens=48,
        kv=Split.on(Tier.CPU, 10**12),
        layer_splits=(Split(gpu_bytes=near, cpu_bytes=layer_bytes - near, disk_bytes=0),) * 48,
    )
    model = Model(shape=OPT_30B.shape, work=OPT_30B.work, hardware=T4_208GB_AS_FLEXGEN)
    workload = Workload.uniform(512, 32, num_rows=144)
    load = load_of(workload, rows=144, prompt_tokens=0, live_tokens=144 * 528)
    terms = Sweep(model, policy).terms(load, kept_tokens=144 * 544)
    theirs = flexgen.decode(CASE_30B)
    hidden_s = 2 * 144 * 7168 / flexgen.TO_GPU
    assert terms.gemm_s / 48 == pytest.approx(theirs["gpu"], rel=0.001)
    assert terms.bus_s / 48 == pytest.approx(theirs["ctog"] - hidden_s, rel=0.001)
    assert terms.beside_s / 48 == pytest.approx(theirs["cpu"] * 0.9864, rel=0.002)
