"""The wire types that the server answers with, and how a domain value becomes one; no HTTP.

Every documented key is always there, null where nothing is known yet: clients count on it.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from jobs.batch import Batch, BatchStatus, LineFault, TokenUsage
from jobs.file import File, Purpose
from jobs.ledger.ledger import Model
from jobs.upload import Part, Upload, UploadStatus

# The contract has no `evals` in answers; clients that validate strictly would refuse the file.
_ANSWERED_PURPOSES: Final[Mapping[Purpose, str]] = {Purpose.EVALS: Purpose.USER_DATA}


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True)


class FileObject(_Wire):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    # Deprecated, yet required by clients.
    status: Literal["processed"] = "processed"
    status_details: str | None = None


class FileDeleted(_Wire):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class UploadObject(_Wire):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: UploadStatus
    file: FileObject | None


class PartObject(_Wire):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class BatchError(_Wire):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(_Wire):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCountsObject(_Wire):
    total: int
    completed: int
    failed: int


class InputTokensDetails(_Wire):
    cached_tokens: int


class OutputTokensDetails(_Wire):
    reasoning_tokens: int


class BatchUsage(_Wire):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class OutputExpiresAfter(_Wire):
    anchor: Literal["created_at"] = "created_at"
    seconds: int


class ProgressObject(_Wire):
    """Of a live batch. Counts are of this moment, expectations of `noted_at`, null before that."""

    lines_total: int
    lines_done: int
    output_tokens: int
    tokens_per_s: float | None
    seconds_left: int | None
    position: int | None
    noted_at: int | None


class WebhookObject(_Wire):
    """Its secret is told to nobody."""

    url: str


class BatchObject(_Wire):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCountsObject
    usage: BatchUsage
    metadata: dict[str, str] | None
    output_expires_after: OutputExpiresAfter | None
    # Not in the contract: clients keep what they do not know.
    progress: ProgressObject | None
    priority: int
    webhook: WebhookObject | None
    retry_of: str | None


class ModelObject(_Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "freight"


class ModelList(_Wire):
    object: Literal["list"] = "list"
    data: list[ModelObject]


Listed = TypeVar("Listed", FileObject, BatchObject)


class ListPage(_Wire, Generic[Listed]):
    object: Literal["list"] = "list"
    data: list[Listed]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ErrorBody(_Wire):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(_Wire):
    error: ErrorBody


def list_page(data: Sequence[Listed], *, has_more: bool) -> ListPage[Listed]:
    return ListPage(
        data=list(data),
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    )


def file_object(file: File) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.num_bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=_ANSWERED_PURPOSES.get(file.purpose, file.purpose),
    )


def upload_object(upload: Upload, file: File | None = None) -> UploadObject:
    return UploadObject(
        id=upload.id,
        bytes=upload.num_bytes,
        created_at=upload.created_at,
        expires_at=upload.expires_at,
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status,
        file=None if file is None else file_object(file),
    )


def part_object(part: Part) -> PartObject:
    return PartObject(id=part.id, created_at=part.created_at, upload_id=part.upload_id)


def batch_object(batch: Batch) -> BatchObject:
    counts, expiry = batch.request_counts, batch.output_expires_after
    webhook = batch.options.webhook
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=_errors(batch.errors),
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at,
        expires_at=batch.expires_at,
        finalizing_at=batch.finalizing_at,
        completed_at=batch.completed_at,
        failed_at=batch.failed_at,
        expired_at=batch.expired_at,
        cancelling_at=batch.cancelling_at,
        cancelled_at=batch.cancelled_at,
        request_counts=RequestCountsObject(
            total=counts.total, completed=counts.completed, failed=counts.failed
        ),
        usage=_usage(batch.usage),
        metadata=None if batch.metadata is None else dict(batch.metadata),
        output_expires_after=None if expiry is None else OutputExpiresAfter(seconds=expiry.seconds),
        progress=None if batch.status.is_final else _progress(batch),
        priority=batch.options.priority,
        webhook=None if webhook is None else WebhookObject(url=webhook.url),
        retry_of=batch.options.retry_of,
    )


def model_object(model: Model) -> ModelObject:
    return ModelObject(id=model.id, created=model.created_at)


def _errors(faults: Sequence[LineFault]) -> BatchErrors | None:
    if not faults:
        return None
    return BatchErrors(
        data=[
            BatchError(
                code=fault.code,
                message=_encodable(fault.message),
                param=None if fault.param is None else _encodable(fault.param),
                line=fault.line,
            )
            for fault in faults
        ]
    )


def _progress(batch: Batch) -> ProgressObject:
    counts, estimate = batch.request_counts, batch.estimate
    per_s = None if estimate is None else estimate.tokens_per_s
    left_s = None if estimate is None else estimate.seconds_left
    return ProgressObject(
        lines_total=counts.total,
        lines_done=counts.completed + counts.failed,
        output_tokens=batch.usage.output_tokens,
        tokens_per_s=None if per_s is None else round(per_s, 3),
        seconds_left=None if left_s is None else round(left_s),
        position=None if estimate is None else estimate.position,
        noted_at=None if estimate is None else estimate.noted_at,
    )


def _usage(usage: TokenUsage) -> BatchUsage:
    return BatchUsage(
        input_tokens=usage.input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
        output_tokens=usage.output_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=usage.input_tokens + usage.output_tokens,
    )


def _encodable(text: str) -> str:
    # A fault may quote its line, and JSON can spell a lone surrogate that UTF-8 cannot.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
