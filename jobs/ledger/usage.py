"""What a tenant holds, and whether its caller may hold more; asked within the writing transaction."""

import time
from typing import Final

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select

from jobs.errors import QuotaError, RateLimitError
from jobs.ledger.tables import batches, files, upload_parts, uploads
from jobs.tenant import Caller
from jobs.upload import UploadStatus

_HOUR_S: Final = 3_600


def is_live() -> ColumnElement[bool]:
    """Of files: neither deleted nor expired."""
    unexpired = or_(files.c.expires_at.is_(None), files.c.expires_at > int(time.time()))
    return and_(files.c.deleted_at.is_(None), unexpired)


def is_pending() -> ColumnElement[bool]:
    """Of uploads: parts may still come, and those that did are kept."""
    return and_(uploads.c.status == UploadStatus.PENDING, uploads.c.expires_at > int(time.time()))


def stored_bytes(connection: Connection, tenant: str) -> int:
    in_files = select(func.sum(files.c.num_bytes)).where(files.c.tenant == tenant, is_live())
    in_parts = (
        select(func.sum(upload_parts.c.num_bytes))
        .join(uploads, uploads.c.id == upload_parts.c.upload_id)
        .where(uploads.c.tenant == tenant, is_pending())
    )
    return sum(int(connection.execute(query).scalar() or 0) for query in (in_files, in_parts))


def check_stored_bytes(connection: Connection, caller: Caller | None, more_bytes: int) -> None:
    """Raises QuotaError if the tenant would hold more than its caller may let it."""
    if caller is None or (limit := caller.limits.stored_bytes) is None:
        return
    held = stored_bytes(connection, caller.tenant)
    if held + more_bytes > limit:
        raise QuotaError(
            f"Stored bytes limit reached: {held} bytes are stored, {more_bytes} more were asked "
            f"for, and the limit is {limit} bytes. Delete files to make room.",
            code="insufficient_quota",
        )


def check_batches_per_hour(connection: Connection, caller: Caller | None) -> None:
    """Raises RateLimitError, with the time until one more is allowed."""
    if caller is None or (limit := caller.limits.batches_per_hour) is None:
        return
    # The one whose leaving the hour makes room: there are `limit` batches from it on.
    query = (
        select(batches.c.created_at)
        .where(batches.c.tenant == caller.tenant)
        .order_by(batches.c.seq.desc())
        .offset(limit - 1)
        .limit(1)
    )
    made_at = connection.execute(query).scalar()
    wait_s = 0 if made_at is None else made_at + _HOUR_S - int(time.time())
    if wait_s > 0:
        raise RateLimitError(
            f"Rate limit reached for batches: {limit} were made within the last hour, and the "
            f"limit is {limit} per hour. Please try again in {wait_s}s.",
            code="rate_limit_exceeded",
            retry_after_s=wait_s,
        )
