"""Machines of round figures and what waits for them, for tests of the planner."""

import dataclasses
from pathlib import Path
from typing import Final

from engine.config import Budgets
from engine.planning.flops import Work
from engine.planning.hardware import Hardware, RateCurve
from engine.planning.planners.base import Situation
from engine.planning.shape import ModelShape, Placeable
from engine.planning.workload import Workload

GIB: Final = 2**30

MACHINE: Final = Hardware(
    name="round figures",
    measured_on="2026-01-01",
    versions={},
    gpu_bytes=16 * GIB,
    host_bytes=64 * GIB,
    disk_bytes=10**12,
    disk_read=RateCurve.flat(1e9),
    disk_write=RateCurve.flat(5e8),
    to_gpu_pinned_bytes_per_s=10e9,
    to_gpu_plain_bytes_per_s=5e9,
    from_gpu_bytes_per_s=8e9,
    memory_bytes_per_s=20e9,
    gemm={
        "cpu/float32": RateCurve(((1.0, 1e10), (100.0, 1e11))),
        "cpu/bfloat16": RateCurve(((1.0, 1e10), (100.0, 1e11))),
        "gpu/float32": RateCurve(((1.0, 1e11), (1000.0, 1e13))),
        "gpu/bfloat16": RateCurve(((1.0, 1e11), (1000.0, 1e13))),
    },
    attention_bytes_per_s={
        "cpu/float32": RateCurve.flat(10e9),
        "cpu/bfloat16": RateCurve.flat(10e9),
        "gpu/float32": RateCurve.flat(200e9),
        "gpu/bfloat16": RateCurve.flat(200e9),
    },
    expand_bytes_per_s={"cpu/bfloat16->float32": RateCurve.flat(5e9)},
    elementwise_bytes_per_s={
        "cpu/float32": 10e9,
        "cpu/bfloat16": 10e9,
        "gpu/float32": 100e9,
        "gpu/bfloat16": 100e9,
    },
    layer_overhead_s=0.0,
    row_overhead_s=0.0,
    sweep_overhead_s=0.0,
)


def budgets_of(*, gpu_bytes: int = 0, host_bytes: int, disk_bytes: int = 10**15) -> Budgets:
    return Budgets(
        gpu_bytes=gpu_bytes, host_bytes=host_bytes, disk_bytes=disk_bytes, spill_dir=Path("spill")
    )


def plain_shape(num_layers: int, *, columns: int = 1000, matrices: int = 4) -> ModelShape:
    """Layers of `matrices` square float32 matrices, an untied head and embedding of 5000 rows."""
    matrix = Placeable(num_bytes=4 * columns * columns, granule_bytes=4 * columns)
    table = Placeable(num_bytes=4 * 5000 * columns, granule_bytes=4 * columns)
    return ModelShape(
        layers=((matrix,) * matrices,) * num_layers,
        fixed_bytes=0,
        embedding=table,
        head=table,
        tied=False,
        scales_logits=False,
        compute_dtype="float32",
        compute_itemsize=4,
        kv_bytes_per_token=num_layers * 8 * columns,
        hidden_size=columns,
        intermediate_size=columns,
        vocab_size=5000,
        max_context_tokens=4096,
    )


def work_of(shape: ModelShape) -> Work:
    """Every stored element is met by every token, keys and values alike in each layer."""
    layers = shape.num_layers
    per_layer = max(1, shape.kv_bytes_per_token // layers)
    return Work(
        matrix_elements=tuple(
            num_bytes // shape.compute_itemsize for num_bytes in shape.layer_bytes
        ),
        windows=(None,) * layers,
        num_heads=10,
        key_size=max(1, shape.hidden_size // 10),
        value_size=max(1, shape.hidden_size // 10),
        kv_bytes_per_token=per_layer,
        head_elements=shape.vocab_size * shape.hidden_size,
        layer_kv_bytes=(per_layer,) * layers,
        expert_elements=(0,) * layers,
        expert_share=1.0,
        layer_values=(0,) * layers,
        layer_products=(4,) * layers,
        expert_products=(0,) * layers,
    )


def situation_of(
    shape: ModelShape, workload: Workload | None = None, **changes: object
) -> Situation:
    """`changes` are of the machine. Without a workload, some short rows."""
    return Situation(
        hardware=dataclasses.replace(MACHINE, **changes),  # type: ignore[arg-type]
        work=work_of(shape),
        workload=workload or Workload.uniform(20, 10, num_rows=4),
    )
