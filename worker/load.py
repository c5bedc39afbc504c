"""From settings to an engine with its weights in place: the one module here that costs torch."""

import functools
from pathlib import Path

import structlog

from engine.engine import Engine
from engine.memory.measure import measure_budgets
from engine.memory.pack_plan import PackPlan
from engine.planning.planners import PLANNERS
from engine.planning.planners.base import Wishes
from engine.sweep.trace import ChromeTrace
from engine.timeline import Timeline
from jobs.settings import Settings
from worker.model import resolve_model


def load(settings: Settings) -> Engine:
    """Raises EngineError, or SettingsError for a model that is not there."""
    log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
    wishes = Wishes(block_rows=settings.block_rows, sweep_tokens=settings.sweep_tokens)
    engine = Engine.load(
        resolve_model(settings),
        budgets=measure_budgets(
            gpu_bytes=settings.gpu_memory_bytes,
            host_bytes=settings.host_memory_bytes,
            disk_bytes=settings.disk_space_bytes,
            spill_dir=settings.weights_dir,
        ),
        policy=functools.partial(PLANNERS["fixed"], wishes=wishes),
        compute_dtype=settings.compute_dtype,
        progress=_PackingNews(log, settings.weights_dir),
        timeline=Timeline(sink=ChromeTrace(settings.trace_file) if settings.trace_file else None),
        call_log=settings.call_log,
        announce=functools.partial(_state_cost, log),
    )
    policy = engine.policy
    log.info(
        "policy",
        reason=policy.reason,
        compute=str(policy.compute),
        compute_dtype=policy.compute_dtype,
        block_rows=policy.block_rows,
        sweep_tokens=policy.sweep_tokens,
        kv_bytes=policy.kv.total_bytes,
        streamed_bytes=policy.streamed_bytes,
    )
    return engine


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
