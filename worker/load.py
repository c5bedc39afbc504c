"""From settings to an engine with its weights in place: the one module here that costs torch."""

import functools
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import structlog
import torch

from engine.config import Budgets
from engine.engine import Engine
from engine.foresight import foresee
from engine.memory.measure import measure_budgets
from engine.memory.pack_plan import PackPlan
from engine.planning.policy import Policy
from engine.planning.shape import ModelShape
from engine.sweep.trace import ChromeTrace
from engine.timeline import Timeline
from jobs.line_group import WaitingBatch
from jobs.settings import Settings
from worker.model import Loaded, resolve_model
from worker.planning import Decision, Planning
from worker.queue_shape import QueueShape
from worker.replanner import Replanner, told


def load(settings: Settings, waiting: Sequence[WaitingBatch] = ()) -> Loaded:
    """An engine for what waits. Raises EngineError, or SettingsError for a model that is not there."""
    _give_back_what_was_closed()
    log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
    source = resolve_model(settings)
    planning = Planning.open(settings)
    queue = QueueShape.of(waiting)
    made: list[Decision] = []

    def decide(shape: ModelShape, budgets: Budgets) -> Policy:
        seen = foresee(source, on_gpu=budgets.gpu_bytes > 0, compute_dtype=settings.compute_dtype)
        made.append(planning.decide(shape, seen.work, budgets, queue))
        return made[-1].policy

    started_s = time.monotonic()
    engine = Engine.load(
        source,
        budgets=measure_budgets(
            gpu_bytes=settings.gpu_memory_bytes,
            host_bytes=settings.host_memory_bytes,
            disk_bytes=settings.disk_space_bytes,
            spill_dir=settings.weights_dir,
        ),
        policy=decide,
        compute_dtype=settings.compute_dtype,
        progress=_PackingNews(log, settings.weights_dir),
        timeline=Timeline(sink=ChromeTrace(settings.trace_file) if settings.trace_file else None),
        call_log=settings.call_log,
        announce=functools.partial(_state_cost, log),
    )
    log.info("policy", **told(made[-1]))
    replanner = Replanner(
        engine,
        planning,
        decision=made[-1],
        queue=queue,
        load_s=time.monotonic() - started_s,
    )
    return Loaded(engine=engine, replanner=replanner)


def _give_back_what_was_closed() -> None:
    """The memory of an engine that this one replaces: what is free is measured next."""
    gc.collect()  # models are cycles
    torch.cuda.empty_cache()


def _state_cost(log: structlog.stdlib.BoundLogger, plan: PackPlan) -> None:
    log.info(
        "weights will be packed",
        folder=str(plan.path),
        to_write_bytes=plan.to_write_bytes,
        resumed_bytes=plan.resumes_from_bytes,
        in_place_bytes=plan.in_place_bytes,
        budget_bytes=plan.budget_bytes,
        free_bytes=plan.free_bytes,
    )


class _PackingNews:
    """Tells how far the packing of weights is: at its start and after every tenth."""

    def __init__(self, log: structlog.stdlib.BoundLogger, folder: Path) -> None:
        self._log = log
        self._folder = folder
        self._next_tenth = 0

    def __call__(self, written_bytes: int, total_bytes: int) -> None:
        tenth = 10 * written_bytes // total_bytes
        if tenth >= self._next_tenth:
            self._next_tenth = tenth + 1
            self._log.info(
                "packing weights",
                folder=str(self._folder),
                written_bytes=written_bytes,
                total_bytes=total_bytes,
            )
