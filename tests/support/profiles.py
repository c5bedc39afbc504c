"""A machine that never was: round figures, measured by nobody."""

from pathlib import Path

from engine.memory.stopwatch import Rate
from engine.planning.hardware import Hardware
from engine.profiling.description import hardware_of
from engine.profiling.measurement import Figure, Measured, Measurement
from engine.profiling.overheads import Overheads
from engine.profiling.saved import valid_for


def _one(figure: Figure, per_s: float, kind: str = "", at: int | None = None) -> Measurement:
    return Measurement(figure=figure, kind=kind, at=at, rate=Rate(per_s=per_s, spread=0.1))


MEASURED = Measured(
    host_bytes=2**34,
    gpu_bytes=0,
    disk_bytes=2**37,
    measurements=(
        *(_one(Figure.DISK_READ, 1e9, at=2**power) for power in (16, 20, 25)),
        *(_one(Figure.DISK_WRITE, 5e8, at=2**power) for power in (16, 20, 25)),
        _one(Figure.MEMORY_READ, 2e10, "cpu"),
        *(_one(Figure.GEMM, 7e9 * rows**0.5, "cpu/float32", rows) for rows in (1, 8, 64, 512)),
        *(_one(Figure.GEMM, 9e9 * rows**0.5, "cpu/bfloat16", rows) for rows in (1, 8, 64, 512)),
        *(_one(Figure.ATTENTION, 6e9 / heads, "cpu/float32", heads) for heads in (1, 4)),
        *(_one(Figure.ATTENTION, 5e9 / heads, "cpu/bfloat16", heads) for heads in (1, 4)),
        *(_one(Figure.PROMPTS, 3e10, f"cpu/{kind}", at=64) for kind in ("float32", "bfloat16")),
        _one(Figure.EXPANSION, 3e10, "cpu/float32->float32", at=32),
        _one(Figure.EXPANSION, 1.5e10, "cpu/bfloat16->float32", at=32),
        _one(Figure.EXPANSION, 1.5e10, "cpu/float16->float32", at=32),
        _one(Figure.EXPANSION, 2e10, "cpu/float32->bfloat16", at=32),
        _one(Figure.EXPANSION, 2e10, "cpu/bfloat16->bfloat16", at=32),
        _one(Figure.EXPANSION, 2e9, "cpu/float16->bfloat16", at=32),
        _one(Figure.ELEMENTWISE, 1.2e10, "cpu/float32"),
        _one(Figure.ELEMENTWISE, 8e9, "cpu/bfloat16"),
    ),
    overheads={
        "cpu": Overheads(
            sweep_s=5e-4,
            step_s=6e-4,
            row_s=4e-5,
            row_step_s=5e-6,
            prompt_step_s=8e-5,
            expert_s=1e-4,
            unit_s=2e-4,
            product_s=1e-5,
            lost_beside_reads=0.1,
        )
    },
)


def hardware_here(spill_dir: Path, *, is_quick: bool = False) -> Hardware:
    """As if this machine had been measured to be so."""
    return hardware_of(MEASURED, valid_for(spill_dir, is_quick=is_quick))
