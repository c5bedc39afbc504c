"""Corrections: slow, bounded, and of those terms alone that a run tells something about."""

import dataclasses

import pytest

from engine.planning.corrections import (
    ATTENTION,
    BETWEEN,
    BUS,
    COMPUTE,
    DISK,
    EXPANSION,
    EXPERTS,
    LAYOUT,
    OVERHEAD,
    PRODUCTS,
    Correction,
    Corrections,
)
from engine.planning.hardware import RateCurve
from engine.planning.machines import T4_208GB

NONE = Corrections(measured_on="then")


def test_one_run_takes_a_factor_a_quarter_of_the_way() -> None:
    learned = NONE.learned({"disk": 1.0, "gemm": 2.0, "head": 1.0}, {"disk": 1.5, "gemm": 1.0})
    assert learned.factor("disk") == pytest.approx(1.5**0.25)
    assert learned.factor("gemm") == pytest.approx(0.5**0.25)
    assert [each.num_runs for each in learned.terms.values()] == [1, 1]
    assert learned.factor("head") == 1.0
    assert learned.measured_on == "then"


def test_runs_that_always_take_so_much_longer_are_met_in_the_end() -> None:
    learned = NONE
    for _ in range(40):
        learned = learned.learned({"disk": 3.0 * learned.factor("disk")}, {"disk": 4.0})
    assert learned.factor("disk") == pytest.approx(4 / 3, rel=1e-3)
    assert learned.terms["disk"].num_runs == 40


@pytest.mark.parametrize(("measured_s", "bound"), [(1e6, 2.0), (1e-6, 0.5)])
def test_no_run_moves_a_factor_beyond_its_bounds(measured_s: float, bound: float) -> None:
    assert NONE.learned({"disk": 1.0}, {"disk": measured_s}).factor("disk") == bound


def test_what_was_not_there_teaches_nothing() -> None:
    known = dataclasses.replace(NONE, terms={"disk": Correction(factor=1.25, num_runs=3)})
    assert known.learned({"disk": 0.0, "gemm": 1.0}, {"disk": 2.0, "gemm": 0.0}) == known


def test_a_corrected_machine_is_slower_by_the_factors_and_as_large_as_before() -> None:
    factors = {DISK: 2.0, BUS: 1.25, ATTENTION: 0.5, COMPUTE: 1.6}
    terms = {name: Correction(factor=factor, num_runs=1) for name, factor in factors.items()}
    found = dataclasses.replace(NONE, terms=terms).applied_to(T4_208GB)
    assert found.disk_read.at(2**20) == T4_208GB.disk_read.at(2**20) / 2
    assert found.disk_write == T4_208GB.disk_write
    assert T4_208GB.to_gpu_pinned_bytes_per_s is not None
    assert found.to_gpu_pinned_bytes_per_s == T4_208GB.to_gpu_pinned_bytes_per_s / 1.25
    attending = T4_208GB.attention_rate("cpu", "float16", 4)
    assert found.attention_rate("cpu", "float16", 4) == 2 * attending
    before = T4_208GB.gemm_flops_per_s("gpu", "float16", 100)
    assert found.gemm_flops_per_s("gpu", "float16", 100) == pytest.approx(before / 1.6)
    assert found.expand_rate("gpu", "int4", "float16", 100) == 60e9 / 1.6
    assert found.row_overhead_s == pytest.approx(1.6 * T4_208GB.row_overhead_s)
    slow = dataclasses.replace(T4_208GB, prompt_layer_overhead_s=1e-3, expert_overhead_s=2e-3)
    slower = dataclasses.replace(NONE, terms=terms).applied_to(slow)
    assert slower.prompt_layer_overhead_s == pytest.approx(0.5e-3)
    assert slower.expert_overhead_s == pytest.approx(3.2e-3)
    assert found.host_bytes == T4_208GB.host_bytes
    assert NONE.applied_to(T4_208GB) == T4_208GB


def test_products_and_what_lies_between_them_are_corrected_apart() -> None:
    factors = {PRODUCTS: 1.25, BETWEEN: 2.0, OVERHEAD: 0.75}
    terms = {name: Correction(factor=factor) for name, factor in factors.items()}
    curves = {"cpu/float32->float32": RateCurve.flat(9e9)}
    machine = dataclasses.replace(T4_208GB, expand_bytes_per_s=curves)
    found = dataclasses.replace(NONE, terms=terms).applied_to(machine)
    before = machine.gemm_flops_per_s("gpu", "float16", 100)
    assert found.gemm_flops_per_s("gpu", "float16", 100) == pytest.approx(before / 1.25)
    assert found.expand_rate("cpu", "float32", "float32", 8) == pytest.approx(9e9 / 1.25)
    before = machine.elementwise_rate("gpu", "float16")
    assert found.elementwise_rate("gpu", "float16") == pytest.approx(before / 2)
    assert found.layer_overhead_s == pytest.approx(1.5 * machine.layer_overhead_s)
    assert found.row_layer_overhead_s == machine.row_layer_overhead_s


def test_layouts_and_experts_are_corrected_within_those() -> None:
    factors = {PRODUCTS: 1.25, BETWEEN: 2.0, LAYOUT: 1.6, EXPERTS: 3.0}
    terms = {name: Correction(factor=factor) for name, factor in factors.items()}
    curves = {
        "cpu/bfloat16->float32": RateCurve.flat(6e9),
        "cpu/float32->float32": RateCurve.flat(9e9),
    }
    machine = dataclasses.replace(T4_208GB, expand_bytes_per_s=curves, expert_overhead_s=1e-3)
    found = dataclasses.replace(NONE, terms=terms).applied_to(machine)
    assert found.expand_rate("cpu", "float32", "float32", 8) == pytest.approx(9e9 / 2)
    assert found.expand_rate("cpu", "bfloat16", "float32", 8) == pytest.approx(6e9 / 1.25)
    assert found.expert_overhead_s == pytest.approx(6e-3)


def test_turning_is_corrected_alone_and_laying_out_is_not() -> None:
    curves = {
        "cpu/bfloat16->float32": RateCurve.flat(6e9),
        "cpu/float32->float32": RateCurve.flat(9e9),
    }
    machine = dataclasses.replace(T4_208GB, expand_bytes_per_s=curves)
    terms = {COMPUTE: Correction(factor=1.5), EXPANSION: Correction(factor=2.0)}
    found = dataclasses.replace(NONE, terms=terms).applied_to(machine)
    assert found.expand_rate("cpu", "bfloat16", "float32", 8) == pytest.approx(2e9)
    assert found.expand_rate("cpu", "float32", "float32", 8) == pytest.approx(6e9)


def test_what_is_by_the_call_is_corrected_beside_the_rest_of_compute() -> None:
    terms = {COMPUTE: Correction(factor=1.5), OVERHEAD: Correction(factor=2.0)}
    found = dataclasses.replace(NONE, terms=terms).applied_to(T4_208GB)
    assert found.row_overhead_s == pytest.approx(3 * T4_208GB.row_overhead_s)
    assert found.row_layer_overhead_s == T4_208GB.row_layer_overhead_s
    before = T4_208GB.gemm_flops_per_s("gpu", "float16", 100)
    assert found.gemm_flops_per_s("gpu", "float16", 100) == pytest.approx(before / 1.5)
