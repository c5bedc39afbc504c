"""From settings to an engine with its weights in place: the one module here that costs torch."""

import functools

import structlog

from engine.engine import Engine
from engine.memory.measure import measure_budgets
from engine.planning.planners import PLANNERS
from engine.planning.planners.base import Wishes
from jobs.settings import Settings
from worker.model import resolve_model


def load(settings: Settings) -> Engine:
    """Raises EngineError, or SettingsError for a model that is not there."""
    log = structlog.get_logger(__name__)
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
    )
    policy = engine.policy
    log.info(
        "policy",
        reason=policy.reason,
        compute=str(policy.compute),
        block_rows=policy.block_rows,
        sweep_tokens=policy.sweep_tokens,
        kv_bytes=policy.kv_bytes,
        streamed_bytes=policy.streamed_bytes,
    )
    return engine
