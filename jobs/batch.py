"""What a batch is: its fields, its statuses and the one table of their legal transitions."""

import dataclasses
import enum
import secrets
import types
from collections.abc import Mapping
from typing import Final

from jobs.tenant import DEFAULT_TENANT
from jobs.webhook import Webhook

SNAPSHOT_PREFIX: Final = "input-"


class BatchStatus(enum.StrEnum):
    """The contract's statuses; no private ones, they break clients."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return not NEXT_STATUSES[self]


_S = BatchStatus
NEXT_STATUSES: Final[Mapping[BatchStatus, frozenset[BatchStatus]]] = types.MappingProxyType(
    {
        _S.VALIDATING: frozenset({_S.IN_PROGRESS, _S.FAILED, _S.CANCELLING, _S.EXPIRED}),
        _S.IN_PROGRESS: frozenset({_S.FINALIZING, _S.CANCELLING, _S.EXPIRED}),
        _S.FINALIZING: frozenset({_S.COMPLETED}),
        _S.CANCELLING: frozenset({_S.CANCELLED}),
        _S.FAILED: frozenset(),
        _S.COMPLETED: frozenset(),
        _S.EXPIRED: frozenset(),
        _S.CANCELLED: frozenset(),
    }
)
"""From a status to those it may become. `advance_batch` of the ledger is the only writer and obeys it."""


class Endpoint(enum.StrEnum):
    """What a batch's lines may ask for."""

    CHAT_COMPLETIONS = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RESPONSES = "/v1/responses"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LineFault:
    """One fault of an input file, in the contract's words. `line` is 1-based, None: whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestCounts:
    """Derived from result rows. Expired and cancelled lines are in `total` only."""

    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpiryPolicy:
    """How long result files live after their creation."""

    seconds: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What a batch may be asked beyond the contract. `expires_after_s` ends it before its window;
    `retry_of` is the batch whose unfinished lines it has.
    """

    priority: int = 0
    expires_after_s: int | None = None
    webhook: Webhook | None = None
    retry_of: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What is expected of a live batch, as of `noted_at`, in Unix seconds.

    `position` counts from 1 the batches that are served before it, with it; `tokens_per_s` is what
    the worker generates for all batches together.
    """

    noted_at: int
    position: int
    tokens_per_s: float | None = None
    seconds_left: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch as the ledger holds it. Times are Unix seconds; each is set once, never cleared."""

    id: str
    endpoint: Endpoint
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: BatchStatus = BatchStatus.VALIDATING
    model: str | None = None
    metadata: Mapping[str, str] | None = None
    output_expires_after: ExpiryPolicy | None = None
    errors: tuple[LineFault, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = dataclasses.field(default_factory=RequestCounts)
    usage: TokenUsage = dataclasses.field(default_factory=TokenUsage)
    options: BatchOptions = dataclasses.field(default_factory=BatchOptions)
    estimate: Estimate | None = None
    tenant: str = DEFAULT_TENANT
    max_enqueued_lines: int | None = None
    """As its maker's key allowed: lines of the tenant on the queue, while it adds to them."""

    @property
    def input_blob(self) -> str:
        """The batch's own snapshot of its input in the file store; deleting the file leaves it."""
        return f"{SNAPSHOT_PREFIX}{self.id}"


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(16)}"
