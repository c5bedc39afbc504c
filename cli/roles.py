"""One role in this process, as `freight serve` and the containers start them."""

from cli.errors import StartError
from jobs.settings import Settings


def server() -> None:
    """Run the HTTP server alone (needs FREIGHT_REDIS_URL)."""
    from server.main import run  # noqa: PLC0415 (a role loads only what it needs)

    run(_settings())


def intake() -> None:
    """Run the intake alone: validation and finalizing, no GPU (needs FREIGHT_REDIS_URL)."""
    from worker.main import run_intake  # noqa: PLC0415 (a role loads only what it needs)

    run_intake(_settings())


def worker() -> None:
    """Run the worker alone: the engine and its model (needs FREIGHT_REDIS_URL)."""
    from worker.main import run_worker  # noqa: PLC0415 (a role loads only what it needs)

    run_worker(_settings())


def _settings() -> Settings:
    settings = Settings.from_environment()
    if settings.redis_url is None:
        raise StartError(
            "FREIGHT_REDIS_URL is not set; a single role has no Valkey of its own. "
            "`freight serve` starts all of them together."
        )
    return settings
