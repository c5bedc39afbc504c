"""Batches take turns: only some shards of each are on the queue; when one is done the next goes on.
Of unequal rank (`jobs.ledger.ranks`), the first goes on alone, before what is on the queue of others.

Whose turn it is, the ledger says (`jobs.ledger.turns`); of what is in shards nothing is known.
"""

from collections.abc import Collection

from jobs.ledger.ledger import Ledger
from jobs.queue import Doorbell


class Feeder:
    """`ahead` shards of a batch at most are queued or held at once; it may be changed."""

    def __init__(self, ledger: Ledger, doorbell: Doorbell, *, ahead: int) -> None:
        self._ledger = ledger
        self._doorbell = doorbell
        self.ahead = ahead

    def feed(self, batch_id: str) -> None:
        """Nothing, while another batch goes before this one."""
        standing = self._ledger.ranks.standing(batch_id)
        if not standing.is_outranked:
            self._ring(batch_id, standing.outranks)

    def ring_again(self, batch_id: str) -> None:
        """What is due to be on the queue, or at work, and is not: its doorbell was lost."""
        queued = self._ledger.lines.queued_shards(batch_id)
        missing = self._doorbell.missing_shards(batch_id, queued)
        if missing:
            outranked = self._ledger.ranks.standing(batch_id).outranks
            for shard_index in missing:
                self._doorbell.shard(batch_id, shard_index, before=outranked)

    def feed_all(self) -> None:
        """Of each tenant the first rank of which something can be rung for: no worker waits for what
        may not go.
        """
        for ranks in self._ledger.ranks.waiting():
            for batch_ids in ranks:
                if sum(self._ring(each) for each in batch_ids):
                    break

    def _ring(self, batch_id: str, outranked: Collection[str] = ()) -> int:
        # Marked first: a doorbell that is lost between the two lines is rung by reconcile.
        indices = self._ledger.lines.queue_shards(batch_id, ahead=self.ahead)
        for shard_index in indices:
            self._doorbell.shard(batch_id, shard_index, before=outranked)
        return len(indices)
