"""The `finalize` task: settle what is left, write the result files, end the batch.

Every step may be repeated: files are named after the batch, records are added once, statuses move
by compare-and-set. Files are readable before the status says so.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from typing import BinaryIO, Final

import structlog

from jobs.batch import Batch, BatchStatus
from jobs.errors import NotFoundError
from jobs.file import BATCH_FILE_LIFETIME_S, File, Purpose
from jobs.line import LineRecord, Outcome, ResultRecord, parse_request_line, unrun_result
from worker.context import IntakeContext, task_context
from worker.input_lines import input_lines

log: Final = structlog.get_logger(__name__)
_WRITE_BYTES: Final = 2**20
_SETTLED_AT_ONCE: Final = 2_000
_ERROR_OUTCOMES: Final = (Outcome.FAILED, Outcome.EXPIRED, Outcome.CANCELLED)


def finalize(batch_id: str) -> None:
    """The RQ task."""
    finalize_batch(task_context(), batch_id)


def finalize_batch(context: IntakeContext, batch_id: str) -> None:
    """Drive the batch as far to its end as the ledger allows. Idempotent."""
    batch = context.ledger.batches.get(batch_id)
    if batch.status is BatchStatus.CANCELLING:
        _settle_and_end(context, batch, Outcome.CANCELLED, BatchStatus.CANCELLED)
    elif _is_expired(context, batch):
        _settle_and_end(context, batch, Outcome.EXPIRED, BatchStatus.EXPIRED)
    elif batch.status is BatchStatus.FINALIZING or _may_finalize(context, batch):
        _write_and_end(context, batch, BatchStatus.COMPLETED)
    if context.ledger.batches.status(batch_id).is_final:
        context.store.delete(batch.input_blob)


def _is_expired(context: IntakeContext, batch: Batch) -> bool:
    """Whether the window ended with lines unfinished, or before there were any."""
    if batch.status not in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):
        return False
    if batch.expires_at > time.time():
        return False
    if batch.status is BatchStatus.VALIDATING:
        return True
    # A crash may have come after the rest was settled as expired.
    expired = next(context.ledger.lines.rows(batch.id, [Outcome.EXPIRED]), None)
    return expired is not None or not context.ledger.lines.is_settled(batch.id)


def _may_finalize(context: IntakeContext, batch: Batch) -> bool:
    if batch.status is not BatchStatus.IN_PROGRESS:
        return False
    if not context.ledger.lines.is_settled(batch.id):
        return False
    return context.ledger.batches.advance(batch.id, BatchStatus.FINALIZING)


def _settle_and_end(
    context: IntakeContext, batch: Batch, outcome: Outcome, status: BatchStatus
) -> None:
    context.ledger.lines.settle_rest(batch.id, outcome)
    if outcome is Outcome.CANCELLED and batch.request_counts.total == 0:
        _settle_unseen(context, batch)
    _write_and_end(context, batch, status)


def _settle_unseen(context: IntakeContext, batch: Batch) -> None:
    """Settle as cancelled what can be read of an input that was not recorded line by line yet."""
    settled: list[ResultRecord] = []
    try:
        with context.store.read(batch.input_blob) as stream:
            for line in _readable_lines(context, batch, stream):
                settled.append(unrun_result(batch.id, line, Outcome.CANCELLED))
                if len(settled) == _SETTLED_AT_ONCE:
                    context.ledger.lines.record(settled)
                    settled.clear()
    except NotFoundError:
        log.warning("the input of a cancelled batch is lost", batch_id=batch.id)
    context.ledger.lines.record(settled)


def _readable_lines(context: IntakeContext, batch: Batch, stream: BinaryIO) -> Iterator[LineRecord]:
    """The lines that are what they should be on the outside, the first of each custom id."""
    custom_ids: set[str] = set()
    for line in input_lines(stream, max_line_bytes=context.settings.max_line_bytes):
        if line.raw is None:
            continue
        request, _ = parse_request_line(line.raw, line=line.number, endpoint=batch.endpoint)
        if request is None or request.custom_id in custom_ids:
            continue
        yield LineRecord(
            index=len(custom_ids),
            custom_id=request.custom_id,
            offset_bytes=line.offset_bytes,
            num_bytes=len(line.raw),
            num_prompt_tokens=0,
            shard_index=0,
        )
        custom_ids.add(request.custom_id)


def _write_and_end(context: IntakeContext, batch: Batch, status: BatchStatus) -> None:
    output = _write(context, batch, "output", (Outcome.COMPLETED,))
    errors = _write(context, batch, "error", _ERROR_OUTCOMES)
    moved = context.ledger.batches.advance(
        batch.id, status, output_file_id=output, error_file_id=errors
    )
    if moved:
        counts = context.ledger.batches.get(batch.id).request_counts
        log.info("batch ended", batch_id=batch.id, status=status, **dataclasses.asdict(counts))


def _write(
    context: IntakeContext, batch: Batch, kind: str, outcomes: tuple[Outcome, ...]
) -> str | None:
    """The id of the file, written and on record; None if there is no line for it."""
    rows = context.ledger.lines.rows(batch.id, outcomes)
    first = next(rows, None)
    if first is None:
        return None
    file_id = result_file_id(batch.id, kind)
    with context.store.write(file_id) as stream:
        stream.write(f"{first}\n".encode())
        for part in _joined(rows):
            stream.write(part)
    now = int(time.time())
    expiry = batch.output_expires_after
    context.ledger.files.add_once(
        File(
            id=file_id,
            purpose=Purpose.BATCH_OUTPUT,
            filename=f"{batch.id}_{kind}.jsonl",
            num_bytes=context.store.size(file_id),
            created_at=now,
            expires_at=now + (expiry.seconds if expiry else BATCH_FILE_LIFETIME_S),
            tenant=batch.tenant,
        )
    )
    return file_id


def result_file_id(batch_id: str, kind: str) -> str:
    """Derived, not drawn: whoever writes the file again after a crash makes no second one."""
    return f"file-{hashlib.sha256(f'{kind}:{batch_id}'.encode()).hexdigest()[:24]}"


def _joined(rows: Iterator[str]) -> Iterator[bytes]:
    part = bytearray()
    for row in rows:
        part += f"{row}\n".encode()
        if len(part) >= _WRITE_BYTES:
            yield bytes(part)
            part.clear()
    yield bytes(part)
