"""Starts the HTTP server of one process, with its log; supervision is someone else's."""

import contextlib
import logging
import sys
from typing import Final

import structlog
import uvicorn

from jobs.ledger.ledger import Ledger
from jobs.settings import Settings
from server.app import create_app
from server.connection import connection_class
from server.exposure import check_exposure
from server.stopping import Server

# Longer than clients keep a connection: the side that is sending must be the one that closes.
_KEEP_ALIVE_S: Final = 75
_SHUTDOWN_S: Final = 10
_NOT_STARTED_STATUS: Final = 3


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; running requests get some seconds to finish.

    Raises SettingsError rather than be open to others without a key.
    """
    with contextlib.closing(Ledger.open(settings.ledger_url)) as ledger:
        has_keys = check_exposure(settings, ledger.keys)
    structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    log = structlog.get_logger()
    if settings.redis_url is None:
        log.warning("no FREIGHT_REDIS_URL: batches are recorded, but nobody is rung for them")
    if not has_keys:
        log.warning("no API key was made yet: whoever reaches this server may use it")
    log.info("serving", host=settings.host, port=settings.port, state_dir=str(settings.state_dir))
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        http=connection_class(settings.client_stall_s),
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    server = Server(config)
    with contextlib.suppress(KeyboardInterrupt):  # raised again when it has stopped for one
        server.run()
    if not server.started:
        sys.exit(_NOT_STARTED_STATUS)


if __name__ == "__main__":
    run(Settings.from_environment())
