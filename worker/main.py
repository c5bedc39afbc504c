"""Starting the two roles: handles opened, model known, then one RQ worker on one queue."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import structlog
from redis import Redis
from redis.exceptions import RedisError
from rq.exceptions import StopRequested

from jobs.errors import SettingsError
from jobs.ledger.ledger import Ledger, delete_unreferenced_blobs
from jobs.queue import INTAKE_QUEUE, Doorbell
from jobs.settings import Settings
from jobs.webhook import Webhook
from worker import model
from worker.accumulator import Accumulator
from worker.block_worker import BlockWorker
from worker.context import IntakeContext, open_store, provide_context
from worker.feed import Feeder
from worker.leased_worker import LeasedWorker
from worker.model import Loaded, LoadEngine, LoadTokenizer
from worker.pace import PaceMeter
from worker.reconcile import Reconciler, delete_stale_snapshots, reconcile
from worker.run_report import RunReport
from worker.webhooks import WebhookSender

_BLOB_GRACE_S: Final = 86_400.0  # no upload takes a day between its bytes and its record
log: Final = structlog.get_logger(__name__)
_MAX_WAIT_S: Final = 5.0
_CONNECT_TIMEOUT_S: Final = 5.0
_INTAKE_STALL_S: Final = 3_600.0  # one task is one step, however long its file
_Worker = TypeVar("_Worker", bound=LeasedWorker)


def run_intake(settings: Settings, *, load_tokenizer: LoadTokenizer = model.load_tokenizer) -> None:
    """Validate, finalize and reconcile until told to stop.

    Raises EngineError or FreightError for a start that cannot succeed.
    """
    with contextlib.closing(Ledger.open(settings.ledger_url)) as ledger:
        served = model.served_model(settings)
        ledger.models.serve(served)
        connection = connect(settings)
        store = open_store(settings)
        renderer = model.load_renderer(
            settings, load_tokenizer, max_context_tokens=served.max_context_tokens
        )
        provide_context(
            IntakeContext(
                settings=settings,
                ledger=ledger,
                store=store,
                doorbell=Doorbell(connection),
                renderer=renderer,
                model_id=served.id,
            )
        )
        delete_stale_snapshots(ledger, store)
        delete_unreferenced_blobs(ledger, store, older_than_s=_BLOB_GRACE_S)
        with _reconciling(settings), _telling(settings):
            _serve(connection, lambda: _intake_worker(settings, connection))


def run_worker(
    settings: Settings,
    *,
    load_engine: LoadEngine = model.load_engine,
    load_tokenizer: LoadTokenizer = model.load_tokenizer,
) -> None:
    """Sweep blocks until told to stop.

    Raises EngineError or FreightError for a start that cannot succeed, SystemExit if the engine
    breaks at work.
    """
    with contextlib.closing(Ledger.open(settings.ledger_url)) as ledger:
        connection = connect(settings)
        model_id = model.served_model(settings).id
        is_to_load = True
        while is_to_load:
            # Before anything is claimed: loading takes longer than a lease.
            loaded = load_engine(settings, ledger.groups.waiting(model_id))
            with contextlib.closing(loaded.engine) as engine:
                renderer = model.load_renderer(
                    settings, load_tokenizer, max_context_tokens=engine.max_context_tokens
                )
                accumulator = Accumulator(
                    engine=engine,
                    ledger=ledger,
                    store=open_store(settings),
                    renderer=renderer,
                    model_id=model_id,
                )
                is_to_load = _sweep_blocks(
                    settings, connection, ledger=ledger, loaded=loaded, accumulator=accumulator
                )


def connect(settings: Settings) -> Redis:
    """Raises SettingsError without an address; does not wait for the server."""
    if settings.redis_url is None:
        raise SettingsError("FREIGHT_REDIS_URL is not set")
    return Redis.from_url(settings.redis_url, socket_connect_timeout=_CONNECT_TIMEOUT_S)


def _serve(connection: Redis, make_worker: Callable[[], LeasedWorker]) -> None:
    """Run workers one after another: a new one whenever Redis was lost and is back."""
    while _run_one(connection, make_worker) is not None:
        continue


def _run_one(connection: Redis, make_worker: Callable[[], _Worker]) -> _Worker | None:
    """The worker, after it has ended by itself; None after a signal. Raises SystemExit."""
    with contextlib.suppress(StopRequested):  # a signal while nothing runs
        _wait_for(connection)
        worker = make_worker()
        stopped = worker.run()
        if worker.failure is not None:
            raise SystemExit(f"freight: {worker.failure}")
        if not stopped:
            return worker
    return None


def _wait_for(connection: Redis) -> None:
    wait_s = 0.1
    while True:
        try:
            connection.ping()
        except RedisError as error:
            log.warning("waiting for redis", error=str(error), wait_s=wait_s)
            time.sleep(wait_s)
            wait_s = min(_MAX_WAIT_S, 2 * wait_s)
        else:
            return


def _intake_worker(settings: Settings, connection: Redis) -> LeasedWorker:
    return LeasedWorker(
        INTAKE_QUEUE, connection=connection, lease_s=settings.lease_s, stall_s=_INTAKE_STALL_S
    )


def _sweep_blocks(
    settings: Settings,
    connection: Redis,
    *,
    ledger: Ledger,
    loaded: Loaded,
    accumulator: Accumulator,
) -> bool:
    """Until told to stop; whether the engine is to be loaded anew instead."""
    while True:
        worker = _run_one(
            connection,
            lambda: _block_worker(
                settings, connection, ledger=ledger, loaded=loaded, accumulator=accumulator
            ),
        )
        if worker is None or worker.wants_load:
            return worker is not None


def _block_worker(
    settings: Settings,
    connection: Redis,
    *,
    ledger: Ledger,
    loaded: Loaded,
    accumulator: Accumulator,
) -> BlockWorker:
    doorbell = Doorbell(connection)
    model_id = accumulator.model_id
    return BlockWorker(
        settings,
        connection=connection,
        engine=loaded.engine,
        accumulator=accumulator,
        doorbell=doorbell,
        feeder=Feeder(ledger, doorbell, ahead=settings.shards_ahead),
        run_report=RunReport(settings.state_dir / "reports"),
        pace=PaceMeter(ledger.progress, model_id=model_id, engine=loaded.engine),
        replanner=loaded.replanner,
        waiting=lambda: ledger.groups.waiting(model_id),
    )


@contextlib.contextmanager
def _reconciling(settings: Settings) -> Iterator[None]:
    """Handles of its own: neither connection is shared between threads that block."""
    connection = connect(settings)
    _wait_for(connection)
    with contextlib.closing(Ledger.open(settings.ledger_url)) as ledger:
        doorbell, store = Doorbell(connection), open_store(settings)
        reconcile(ledger, doorbell, store, shards_ahead=settings.shards_ahead)
        reconciler = Reconciler(
            ledger,
            doorbell,
            store,
            shards_ahead=settings.shards_ahead,
            every_s=settings.reconcile_s,
        )
        reconciler.start()
        try:
            yield
        finally:
            reconciler.stop()


@contextlib.contextmanager
def _telling(settings: Settings) -> Iterator[None]:
    """Listeners are told of batches that ended, beside all else."""
    url, secret = settings.webhook_url, settings.webhook_secret
    with contextlib.closing(Ledger.open(settings.ledger_url)) as ledger:
        sender = WebhookSender(
            ledger,
            installation=None if url is None else Webhook(url=url, secret=secret),
            secret=secret,
            networks=settings.webhook_networks,
            every_s=settings.reconcile_s,
        )
        sender.start()
        try:
            yield
        finally:
            sender.stop()
