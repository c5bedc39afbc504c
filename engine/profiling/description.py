"""What was measured of a machine, as a planner is told it; measures nothing."""

import datetime as dt
from collections.abc import Mapping
from typing import Final

from engine.planning.corrections import Correction, Corrections
from engine.planning.hardware import Hardware, RateCurve
from engine.profiling.measurement import Figure, Measured

_SPREADS: Final = {
    "disk_read": Figure.DISK_READ,
    "disk_write": Figure.DISK_WRITE,
    "to_gpu_pinned_bytes_per_s": Figure.TO_GPU,
    "to_gpu_plain_bytes_per_s": Figure.TO_GPU_PLAIN,
    "from_gpu_bytes_per_s": Figure.TO_CPU,
    "memory_bytes_per_s": Figure.MEMORY_READ,
    "gemm": Figure.GEMM,
    "attention_bytes_per_s": Figure.ATTENTION,
    "prompt_flops_per_s": Figure.PROMPTS,
    "expand_bytes_per_s": Figure.EXPANSION,
    "elementwise_bytes_per_s": Figure.ELEMENTWISE,
}


def hardware_of(measured: Measured, versions: Mapping[str, str]) -> Hardware:
    """With every rate as a run has it, where a run was measured."""
    measured_on = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    found = Corrections(
        measured_on=measured_on,
        terms={term: Correction(factor=factor) for term, factor in measured.factors.items()},
    )
    return found.applied_to(_as_called(measured, versions, measured_on))


def _as_called(measured: Measured, versions: Mapping[str, str], measured_on: str) -> Hardware:
    tier = "gpu" if measured.gpu_bytes else "cpu"
    costs = measured.overheads[tier]
    return Hardware(
        name=versions.get("gpu") or versions["cpu"],
        measured_on=measured_on,
        versions=versions,
        gpu_bytes=measured.gpu_bytes,
        host_bytes=measured.host_bytes,
        disk_bytes=measured.disk_bytes,
        disk_read=_curve(measured, Figure.DISK_READ),
        disk_write=_curve(measured, Figure.DISK_WRITE),
        to_gpu_pinned_bytes_per_s=measured.rate(Figure.TO_GPU),
        to_gpu_plain_bytes_per_s=measured.rate(Figure.TO_GPU_PLAIN),
        from_gpu_bytes_per_s=measured.rate(Figure.TO_CPU),
        memory_bytes_per_s=_rate(measured, Figure.MEMORY_READ, "cpu"),
        gemm=_curves(measured, Figure.GEMM),
        attention_bytes_per_s=_curves(measured, Figure.ATTENTION),
        prompt_flops_per_s=_curves(measured, Figure.PROMPTS),
        expand_bytes_per_s=_curves(measured, Figure.EXPANSION),
        elementwise_bytes_per_s={
            kind: _rate(measured, Figure.ELEMENTWISE, kind)
            for kind in measured.kinds(Figure.ELEMENTWISE)
        },
        layer_overhead_s=costs.step_s,
        row_overhead_s=costs.row_s,
        row_layer_overhead_s=costs.row_step_s,
        sweep_overhead_s=costs.sweep_s,
        prompt_layer_overhead_s=costs.prompt_step_s,
        expert_overhead_s=costs.expert_s,
        product_overhead_s=costs.product_s,
        unit_overhead_s=costs.unit_s,
        lost_beside_reads=costs.lost_beside_reads,
        lost_beside_fetches=costs.lost_beside_fetches,
        others_share=round(measured.others_share, 4),
        spread={name: round(measured.spread(figure), 4) for name, figure in _SPREADS.items()},
    )


def _curve(measured: Measured, figure: Figure, kind: str = "") -> RateCurve:
    return RateCurve(tuple((float(at), rate) for at, rate in measured.curve(figure, kind)))


def _curves(measured: Measured, figure: Figure) -> dict[str, RateCurve]:
    return {kind: _curve(measured, figure, kind) for kind in measured.kinds(figure)}


def _rate(measured: Measured, figure: Figure, kind: str) -> float:
    rate = measured.rate(figure, kind)
    assert rate is not None, "every machine is asked for it"
    return rate
