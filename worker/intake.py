"""The `validate` task: look at every line, learn lengths, record lines and shards, ring the worker.

Runs in the intake process: a tokenizer, no weights.
"""

import dataclasses
import time
from typing import BinaryIO, Final

import structlog

from jobs.batch import Batch, BatchStatus, LineFault
from jobs.errors import NotFoundError, RequestError
from jobs.line import LineRecord, ResultRecord, parse_request_line, refused_result
from worker.context import IntakeContext, task_context
from worker.feed import Feeder
from worker.grouping import RenderedGrouping
from worker.input_lines import InputLine, input_lines
from worker.inspection import Inspection
from worker.render import error_body

log: Final = structlog.get_logger(__name__)
_LINES_BETWEEN_LOOKS: Final = 500


def validate(batch_id: str) -> None:
    """The RQ task."""
    validate_batch(task_context(), batch_id)


def validate_batch(context: IntakeContext, batch_id: str) -> None:
    """Idempotent: a batch that is no longer `validating` is somebody else's affair."""
    batch = context.ledger.batches.get(batch_id)
    if batch.status is not BatchStatus.VALIDATING:
        return
    if batch.expires_at <= time.time():
        context.doorbell.finalize(batch_id)
        return
    try:
        with context.store.read(batch.input_blob) as stream:
            faults = _inspect(context, batch, stream)
            prepared = None if faults else _prepare(context, batch, stream)
    except NotFoundError:
        message = f"Cannot find file {batch.input_file_id}."
        faults = [LineFault(code="invalid_request", message=message, param="file_id")]
        prepared = None
    if faults:
        _fail(context, batch, faults)
    elif prepared is not None:
        _begin(context, batch, prepared)


def _inspect(context: IntakeContext, batch: Batch, stream: BinaryIO) -> list[LineFault]:
    settings = context.settings
    inspection = Inspection(
        endpoint=batch.endpoint,
        served_model=context.model_id,
        max_lines=settings.max_batch_lines,
        max_line_bytes=settings.max_line_bytes,
    )
    return inspection.look(input_lines(stream, max_line_bytes=settings.max_line_bytes))


def _fail(context: IntakeContext, batch: Batch, faults: list[LineFault]) -> None:
    """All or nothing: one fault, and no line of the batch runs."""
    if context.ledger.batches.advance(batch.id, BatchStatus.FAILED, errors=faults):
        context.store.delete(batch.input_blob)
        log.info("batch failed validation", batch_id=batch.id, num_faults=len(faults))


@dataclasses.dataclass(slots=True, kw_only=True)
class _Prepared:
    """Small records of all lines, made before the ledger's write lock is taken."""

    lines: list[LineRecord] = dataclasses.field(default_factory=list)
    refused: list[ResultRecord] = dataclasses.field(default_factory=list)
    grouping: RenderedGrouping = dataclasses.field(default_factory=RenderedGrouping)

    @property
    def num_runnable(self) -> int:
        return len(self.lines) - len(self.refused)


def _prepare(context: IntakeContext, batch: Batch, stream: BinaryIO) -> _Prepared | None:
    """Tokenise all; None if the batch was cancelled meanwhile."""
    prepared = _Prepared()
    for line in input_lines(stream, max_line_bytes=context.settings.max_line_bytes):
        due = len(prepared.lines) % _LINES_BETWEEN_LOOKS == 0
        if due and context.ledger.batches.status(batch.id) is not BatchStatus.VALIDATING:
            return None
        _add(context, batch, line, prepared)
    return prepared


def _add(context: IntakeContext, batch: Batch, line: InputLine, prepared: _Prepared) -> None:
    assert line.raw is not None
    request, _ = parse_request_line(line.raw, line=line.number, endpoint=batch.endpoint)
    assert request is not None
    index = len(prepared.lines)
    record = LineRecord(
        index=index,
        custom_id=request.custom_id,
        offset_bytes=line.offset_bytes,
        num_bytes=len(line.raw),
        num_prompt_tokens=0,
        shard_index=prepared.num_runnable // context.settings.shard_lines,
    )
    try:
        rendered = context.renderer.render(batch, index, request.body)
    except RequestError as error:
        # Beside the last runnable line: shards stay dense, and none is made for refusals alone.
        shard_index = max(0, prepared.num_runnable - 1) // context.settings.shard_lines
        record = dataclasses.replace(record, shard_index=shard_index)
        prepared.refused.append(
            refused_result(batch.id, record, status_code=400, error=error_body(error))
        )
        prepared.lines.append(record)
    else:
        num_tokens = rendered.num_prompt_tokens
        prepared.lines.append(dataclasses.replace(record, num_prompt_tokens=num_tokens))
        prepared.grouping.add(rendered)


def _begin(context: IntakeContext, batch: Batch, prepared: _Prepared) -> None:
    began = context.ledger.lines.begin(
        batch.id,
        model=context.model_id,
        found=prepared.lines,
        refused=prepared.refused,
        groups=prepared.grouping.groups(),
    )
    if not began:
        return
    log.info(
        "batch in progress",
        batch_id=batch.id,
        num_lines=len(prepared.lines),
        num_refused=len(prepared.refused),
        num_prompt_tokens=sum(line.num_prompt_tokens for line in prepared.lines),
    )
    if prepared.num_runnable == 0:
        context.doorbell.finalize(batch.id)
        return
    ahead = context.settings.shards_ahead
    Feeder(context.ledger, context.doorbell, ahead=ahead).feed(batch.id)
