"""From the ledger's truth, ring again what is due: at every start, and every few seconds.

With it, everything in Redis may be lost at any time.
"""

import threading
import time
from typing import Final

import structlog

from jobs.batch import SNAPSHOT_PREFIX, Batch, BatchStatus
from jobs.errors import NotFoundError
from jobs.ledger.ledger import Ledger
from jobs.queue import Doorbell
from jobs.stores.base import FileStore
from worker.estimates import note_estimates
from worker.feed import Feeder

log: Final = structlog.get_logger(__name__)
_RIDER_GRACE_S: Final = 60.0  # their server answers and removes them itself
_LIVE: Final = tuple(status for status in BatchStatus if not status.is_final)


def reconcile(ledger: Ledger, doorbell: Doorbell, store: FileStore, *, shards_ahead: int) -> None:
    served = {model.id for model in ledger.models.all()}
    feeder = Feeder(ledger, doorbell, ahead=shards_ahead)
    live = ledger.batches.with_status(_LIVE)
    for batch in live:
        if _is_due_for_finalize(ledger, batch):
            doorbell.finalize(batch.id)
        elif batch.status is BatchStatus.VALIDATING:
            doorbell.validate(batch.id)
        elif batch.model in served:  # others wait for their model to be served again
            feeder.feed(batch.id)
            feeder.ring_again(batch.id)
    note_estimates(ledger, live)
    ledger.riders.remove_expired(grace_s=_RIDER_GRACE_S)
    if parties := ledger.riders.parties():
        for party_id in doorbell.missing_parties(parties):
            doorbell.riders(party_id)
    for file_id in ledger.files.expired():
        store.delete(file_id)
        ledger.files.forget(file_id)
    for part_id in ledger.uploads.needless_parts():
        store.delete(part_id)
        ledger.uploads.forget_part(part_id)


def delete_stale_snapshots(ledger: Ledger, store: FileStore) -> None:
    """Inputs of batches that ended just before a crash. One of no known batch may be being made."""
    for name in list(store.names()):
        if not name.startswith(SNAPSHOT_PREFIX):
            continue
        try:
            status = ledger.batches.status(name.removeprefix(SNAPSHOT_PREFIX))
        except NotFoundError:
            continue
        if status.is_final:
            store.delete(name)


class Reconciler:
    """`reconcile` in a daemon thread with handles of its own, until stopped."""

    def __init__(
        self,
        ledger: Ledger,
        doorbell: Doorbell,
        store: FileStore,
        *,
        shards_ahead: int,
        every_s: float,
    ) -> None:
        self._ledger = ledger
        self._doorbell = doorbell
        self._store = store
        self._shards_ahead = shards_ahead
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=self._every_s)

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            try:
                reconcile(
                    self._ledger, self._doorbell, self._store, shards_ahead=self._shards_ahead
                )
            except Exception as error:  # noqa: BLE001 - without this thread nothing is rung again
                log.warning("reconcile failed, trying again", error=repr(error))


def _is_due_for_finalize(ledger: Ledger, batch: Batch) -> bool:
    if batch.status in (BatchStatus.FINALIZING, BatchStatus.CANCELLING):
        return True
    if batch.expires_at <= time.time():
        return True
    return batch.status is BatchStatus.IN_PROGRESS and ledger.lines.is_settled(batch.id)
