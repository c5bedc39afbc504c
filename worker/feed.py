"""Batches take turns: only some shards of each are on the queue; when one is done the next goes on.

Whose turn it is, the ledger says (`jobs.ledger.turns`); of what is in shards nothing is known.
"""

from jobs.ledger.ledger import Ledger
from jobs.queue import Doorbell


class Feeder:
    """`ahead` shards of a batch at most are queued or held at once; it may be changed."""

    def __init__(self, ledger: Ledger, doorbell: Doorbell, *, ahead: int) -> None:
        self._ledger = ledger
        self._doorbell = doorbell
        self.ahead = ahead

    def feed(self, batch_id: str) -> None:
        # Marked first: a doorbell that is lost between the two lines is rung by reconcile.
        for shard_index in self._ledger.lines.queue_shards(batch_id, ahead=self.ahead):
            self._doorbell.shard(batch_id, shard_index)

    def feed_all(self) -> None:
        for batch_id in self._ledger.lines.waiting_batches():
            self.feed(batch_id)
