"""When each live batch may be done: what waits before it, at the pace that the worker goes at."""

import dataclasses
import time
from collections.abc import Sequence

from jobs.batch import Batch, BatchStatus, Estimate
from jobs.ledger.ledger import Ledger
from jobs.ledger.ranks import Rank, rank_of
from jobs.line_group import OutputGroup, WaitingBatch
from worker.queue_shape import QueueShape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a batch has before it: `tokens_left` are those it will generate, None: not known yet."""

    batch_id: str
    rank: Rank
    tokens_left: float | None


def note_estimates(ledger: Ledger, live: Sequence[Batch]) -> None:
    """`live`, oldest first; those that only wait for their end are past all expectation."""
    served = ledger.models.all()
    if not live or not served:
        return
    pace = ledger.progress.pace(served[0].id)  # one model at a time
    works = [_work(ledger, batch) for batch in live if _is_waiting(batch, served[0].id)]
    ledger.progress.note_estimates(
        estimated(
            works,
            tokens_per_s=pace.tokens_per_s or pace.predicted_tokens_per_s,
            noted_at=int(time.time()),
        )
    )


def estimated(
    works: Sequence[Work], *, tokens_per_s: float | None, noted_at: int
) -> dict[str, Estimate]:
    """Of batches, oldest first: what outranks one goes before it, what equals it takes turns."""
    ordered = sorted(works, key=lambda work: work.rank)
    return {
        work.batch_id: Estimate(
            noted_at=noted_at,
            position=position,
            tokens_per_s=tokens_per_s,
            seconds_left=_seconds_left(work, works, tokens_per_s),
        )
        for position, work in enumerate(ordered, start=1)
    }


def _seconds_left(work: Work, works: Sequence[Work], per_s: float | None) -> float | None:
    if work.tokens_left is None or not per_s:
        return None
    mine = work.tokens_left
    before = sum(each.tokens_left or 0.0 for each in works if each.rank < work.rank)
    beside = sum(min(each.tokens_left or 0.0, mine) for each in works if each.rank == work.rank)
    return (before + beside) / per_s


def _is_waiting(batch: Batch, served: str) -> bool:
    if batch.status is BatchStatus.VALIDATING:
        return True
    return batch.status is BatchStatus.IN_PROGRESS and batch.model == served


def _work(ledger: Ledger, batch: Batch) -> Work:
    options, counts = batch.options, batch.request_counts
    deadline_at = batch.expires_at if options.expires_after_s is not None else None
    rank = rank_of(priority=options.priority, deadline_at=deadline_at)
    groups = ledger.groups.of(batch.id)
    if not groups:
        return Work(batch_id=batch.id, rank=rank, tokens_left=None)
    done = OutputGroup(num_lines=counts.completed, output_tokens=batch.usage.output_tokens)
    shape = QueueShape.of(
        [
            WaitingBatch(
                batch_id=batch.id,
                num_open=counts.total - counts.completed - counts.failed,
                groups=groups,
                outputs=(done,) if done.num_lines else (),
            )
        ]
    )
    return Work(
        batch_id=batch.id, rank=rank, tokens_left=shape.num_rows * shape.mean("output_tokens")
    )
