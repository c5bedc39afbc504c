"""What `freight plan` asks a planner, and the frontier of its answers."""

import dataclasses
from pathlib import Path
from typing import Self

from cli.errors import StartError
from cli.file_workload import waiting_of_file
from cli.frontier_page import Mark, frontier_page
from engine.config import Budgets
from engine.errors import EngineError, HardwareError
from engine.foresight import Foresight, foresee
from engine.planning.corrections import Corrections
from engine.planning.frontier import frontier
from engine.planning.hardware import Hardware
from engine.planning.machines import MACHINES
from engine.planning.others import known_policies
from engine.planning.plan import Plan, make_plan
from engine.planning.planners.base import Situation, Wishes
from engine.planning.predict import predict
from engine.planning.prediction import Prediction
from engine.planning.roofline import Model
from engine.profiling.saved import read_hardware
from jobs.settings import Settings
from worker.model import load_renderer, load_tokenizer
from worker.planning import known_hardware, read_corrections
from worker.queue_shape import QueueShape
from worker.workload import workload_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`corrections` are of runs on this machine; on another one there are none."""

    source: Path
    seen: Foresight
    budgets: Budgets
    situation: Situation
    wishes: Wishes
    corrections: Corrections

    @classmethod
    def of(cls, settings: Settings, *, workload: Path | None, hardware: str | None) -> Self:
        """Of the model of `settings`. Raises EngineError, StartError."""
        assert settings.model is not None, "a model was found"
        source = Path(settings.model)
        machine = _machine(settings, hardware)
        corrections = Corrections(measured_on=machine.measured_on)
        if hardware is None and settings.profile is None:
            corrections = read_corrections(settings.corrections_file, machine)
        budgets = _budgets(settings, machine)
        seen = foresee(source, on_gpu=budgets.gpu_bytes > 0, compute_dtype=settings.compute_dtype)
        situation = Situation(
            hardware=corrections.applied_to(machine),
            work=seen.work,
            workload=workload_of(
                _queue(settings, workload, seen.max_context_tokens),
                longest_tokens=seen.max_context_tokens,
            ),
        )
        return cls(
            source=source,
            seen=seen,
            budgets=budgets,
            situation=situation,
            wishes=Wishes(
                block_rows=settings.block_rows,
                sweep_tokens=settings.sweep_tokens,
                situation=situation,
            ),
            corrections=corrections,
        )

    def answer(self) -> Plan:
        """Raises BudgetError, HardwareError."""
        return make_plan(self.seen.shape, self.budgets, self.wishes, with_sensitivities=True)

    def page(self, plan: Plan) -> str:
        """The frontier, with other systems' policies marked on it."""
        shape, situation = self.seen.shape, self.situation
        ours = [
            _mark(f"{each.policy.block_rows} rows", each.prediction, each.policy.reason)
            for each in frontier(shape, self.budgets, self.wishes)
        ]
        model = Model(shape=shape, work=situation.work, hardware=situation.hardware)
        others = [
            _mark(
                f"{known.label}, {known.policy.block_rows} rows",
                predict(model, known.policy, situation.workload),
                "carried out by Freight's schedule",
            )
            for known in known_policies(shape, self.budgets, situation.workload)
        ]
        chosen = _mark("chosen", plan.prediction, plan.policy.reason)
        return frontier_page(
            f"{self.source.name} on {situation.hardware.name}",
            f"{situation.workload.num_rows:,} rows of {situation.workload.mean_prompt_tokens:.0f} "
            f"prompt and {situation.workload.mean_output_tokens:.0f} output tokens in the mean; "
            "as predicted",
            ours,
            [chosen, *others],
        )


def _machine(settings: Settings, hardware: str | None) -> Hardware:
    if hardware is None:
        return known_hardware(settings)
    if hardware in MACHINES:
        return MACHINES[hardware]
    if not Path(hardware).is_file():
        raise StartError(
            f"there is no file {hardware}, and no machine of that name; known are "
            f"{', '.join(MACHINES)}"
        )
    return read_hardware(Path(hardware))


def _budgets(settings: Settings, machine: Hardware) -> Budgets:
    """What the machine has, or less where the settings say so."""
    asked = (settings.gpu_memory_bytes, settings.host_memory_bytes, settings.disk_space_bytes)
    has = (machine.gpu_bytes, machine.host_bytes, machine.disk_bytes)
    gpu, host, disk = (had if want is None else want for want, had in zip(asked, has, strict=True))
    if gpu and not machine.gpu_bytes:
        raise HardwareError(
            f"{gpu:,} bytes of GPU memory are asked for, and {machine.name} has no GPU"
        )
    return Budgets(gpu_bytes=gpu, host_bytes=host, disk_bytes=disk, spill_dir=settings.weights_dir)


def _queue(settings: Settings, workload: Path | None, max_context_tokens: int) -> QueueShape:
    if workload is None:
        return QueueShape(kinds=())
    try:
        renderer = load_renderer(settings, load_tokenizer, max_context_tokens=max_context_tokens)
    except EngineError as error:
        raise StartError(f"{workload} cannot be rendered: {error}") from error
    return QueueShape.of([waiting_of_file(workload, settings, renderer)])


def _mark(label: str, prediction: Prediction, detail: str) -> Mark:
    return Mark(
        label=label,
        tokens_per_s=prediction.tokens_per_s,
        latency_s=prediction.latency_s,
        detail=detail,
    )
