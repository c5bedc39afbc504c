"""One role in this process, as `freight serve` and the containers start them."""

import typer

from cli.errors import StartError
from cli.options import (
    ComputeIn,
    DiskSpace,
    GpuMemory,
    HostMemory,
    ModelOption,
    PolicyFile,
    SpillDir,
    Trace,
    overridden,
)
from jobs.settings import Settings


def server() -> None:
    """Run the HTTP server alone (needs FREIGHT_REDIS_URL)."""
    settings = _settings()
    from server.main import run  # noqa: PLC0415 (a role loads only what it needs)

    run(settings)


def intake() -> None:
    """Run the intake alone: validation and finalizing, no GPU (needs FREIGHT_REDIS_URL)."""
    settings = _settings()
    from worker.main import run_intake  # noqa: PLC0415 (a role loads only what it needs)

    run_intake(settings)


def worker(
    model: ModelOption = None,
    *,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    disk_space: DiskSpace = None,
    spill_dir: SpillDir = None,
    compute_dtype: ComputeIn = None,
    policy: PolicyFile = None,
    trace: Trace = None,
) -> None:
    """Run the worker alone: the engine and its model (needs FREIGHT_REDIS_URL)."""
    settings = overridden(
        _settings(),
        model=model,
        gpu_memory_bytes=gpu_memory,
        host_memory_bytes=host_memory,
        disk_space_bytes=disk_space,
        spill_dir=spill_dir,
        compute_dtype=compute_dtype,
        policy=policy,
        trace_file=trace,
    )
    from worker.main import run_worker  # noqa: PLC0415 (a role loads only what it needs)

    run_worker(settings)


def healthy() -> None:
    """Exit 0 if this host's intake or worker listens; the containers' health check."""
    from cli.presence import host_is_present  # noqa: PLC0415 (rq is slow to import)

    redis_url = _settings().redis_url
    if redis_url is None or not host_is_present(redis_url):
        raise typer.Exit(1)


def _settings() -> Settings:
    settings = Settings.from_environment()
    if settings.redis_url is None:
        raise StartError(
            "FREIGHT_REDIS_URL is not set; a single role has no Valkey of its own. "
            "`freight serve` starts all of them together."
        )
    return settings
