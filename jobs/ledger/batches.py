"""The ledger's batch records: status by compare-and-set, counts derived from result rows."""

import dataclasses
import time
from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, func, insert, select, update

from jobs.batch import (
    NEXT_STATUSES,
    Batch,
    BatchStatus,
    Endpoint,
    ExpiryPolicy,
    LineFault,
    RequestCounts,
    TokenUsage,
)
from jobs.errors import ConflictError, NotFoundError
from jobs.ledger.database import Database
from jobs.ledger.deliveries import note_end
from jobs.ledger.files import Page, is_id, position_of
from jobs.ledger.options import insert_options, read_options
from jobs.ledger.progress import read_estimate
from jobs.ledger.scope import WHOLE, Scope
from jobs.ledger.tables import batches, idempotency_keys, lines, results
from jobs.ledger.usage import check_batches_per_hour
from jobs.line import Outcome
from jobs.tenant import DEFAULT_TENANT


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyKey:
    """A client's own name for one wish, and the digest of the wish. Each tenant has its own."""

    key: str
    digest: str


class BatchRecords:
    def __init__(self, database: Database, scope: Scope = WHOLE) -> None:
        self._database = database
        self._scope = scope
        self._owned = scope.owns(batches)
        self._tenant = scope.owner_of_new(DEFAULT_TENANT)

    def add(self, batch: Batch, *, key: IdempotencyKey | None = None) -> bool:
        """False, and nothing written, if the key stands for a batch already. The batch is the
        scope's, if that is one tenant's, and under its caller's limits. Raises RateLimitError.
        """
        with self._database.writing(alone=self._scope.tenant) as connection:
            if key is not None and _keyed(connection, key, self._tenant) is not None:
                return False
            check_batches_per_hour(connection, self._scope.caller)
            claimed = self._claimed(batch)
            connection.execute(insert(batches).values(**_row(claimed)))
            insert_options(connection, claimed)
            if key is not None:
                connection.execute(
                    insert(idempotency_keys).values(
                        tenant=self._tenant,
                        key=key.key,
                        digest=key.digest,
                        batch_id=batch.id,
                    )
                )
            return True

    def _claimed(self, batch: Batch) -> Batch:
        caller = self._scope.caller
        if caller is None:
            return batch
        limit = caller.limits.enqueued_lines
        return dataclasses.replace(batch, tenant=caller.tenant, max_enqueued_lines=limit)

    def of_key(self, key: IdempotencyKey) -> Batch | None:
        """The batch that the key stands for. Raises ConflictError if it asked for another one."""
        with self._database.reading() as connection:
            found = _keyed(connection, key, self._tenant)
            if found is None:
                return None
            if found.digest != key.digest:
                raise ConflictError(
                    f"The idempotency key '{key.key}' was used with other parameters before.",
                    code="idempotency_key_reused",
                )
            return read_batch(connection, found.batch_id, owned=self._owned)

    def get(self, batch_id: str) -> Batch:
        """Raises NotFoundError."""
        with self._database.reading() as connection:
            return read_batch(connection, batch_id, owned=self._owned)

    def page(self, *, limit: int, after: str | None = None) -> Page[Batch]:
        """Newest first. Raises InvalidRequestError for an `after` that never existed."""
        query = select(batches).where(self._owned).order_by(batches.c.seq.desc())
        with self._database.reading() as connection:
            if after is not None:
                position = position_of(connection, batches, after, owned=self._owned)
                query = query.where(batches.c.seq < position)
            rows = connection.execute(query.limit(limit + 1)).all()
            found = [_batch(connection, row) for row in rows[:limit]]
        return Page(items=found, has_more=len(rows) > limit)

    def with_status(self, statuses: Collection[BatchStatus]) -> list[Batch]:
        """All batches now in one of the statuses, oldest first."""
        query = select(batches).where(batches.c.status.in_(statuses), self._owned)
        query = query.order_by(batches.c.seq)
        with self._database.reading() as connection:
            return [_batch(connection, row) for row in connection.execute(query).all()]

    def status(self, batch_id: str) -> BatchStatus:
        """The status alone, cheaply. Raises NotFoundError."""
        with self._database.reading() as connection:
            found = connection.execute(
                select(batches.c.status).where(batches.c.id == batch_id, self._owned)
            ).scalar()
        if found is None:
            raise no_batch(batch_id)
        return BatchStatus(found)

    def statuses(self, batch_ids: Collection[str]) -> dict[str, BatchStatus]:
        """The statuses of those of the batches that exist, in one look."""
        query = select(batches.c.id, batches.c.status).where(
            batches.c.id.in_(batch_ids), self._owned
        )
        with self._database.reading() as connection:
            return {row.id: BatchStatus(row.status) for row in connection.execute(query).all()}

    def advance(
        self,
        batch_id: str,
        to: BatchStatus,
        *,
        model: str | None = None,
        errors: Iterable[LineFault] = (),
        output_file_id: str | None = None,
        error_file_id: str | None = None,
    ) -> bool:
        """Move the batch to `to` if its present status allows it; whether this call moved it."""
        with self._database.writing() as connection:
            return advance_batch(
                connection,
                batch_id,
                to,
                model=model,
                errors=errors,
                output_file_id=output_file_id,
                error_file_id=error_file_id,
                owned=self._owned,
            )


def _row(batch: Batch) -> dict[str, Any]:
    expiry = batch.output_expires_after
    return {
        "id": batch.id,
        "endpoint": batch.endpoint,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "metadata": dict(batch.metadata) if batch.metadata is not None else None,
        "output_expires_after_s": expiry.seconds if expiry else None,
        "errors": [],
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        "tenant": batch.tenant,
        "max_enqueued_lines": batch.max_enqueued_lines,
    }


def _keyed(connection: Connection, key: IdempotencyKey, tenant: str) -> Row[Any] | None:
    query = select(idempotency_keys).where(
        idempotency_keys.c.tenant == tenant, idempotency_keys.c.key == key.key
    )
    return connection.execute(query).one_or_none()


def no_batch(batch_id: str) -> NotFoundError:
    return NotFoundError(f"No batch found with id '{batch_id}'.", param="id")


def read_batch(connection: Connection, batch_id: str, *, owned: ColumnElement[bool]) -> Batch:
    row = None
    if is_id(batch_id):
        query = select(batches).where(batches.c.id == batch_id, owned)
        row = connection.execute(query).one_or_none()
    if row is None:
        raise no_batch(batch_id)
    return _batch(connection, row)


def advance_batch(
    connection: Connection,
    batch_id: str,
    to: BatchStatus,
    *,
    model: str | None = None,
    errors: Iterable[LineFault] = (),
    output_file_id: str | None = None,
    error_file_id: str | None = None,
    owned: ColumnElement[bool],
) -> bool:
    """The one writer of `status`: a compare-and-set over the table of legal transitions."""
    allowed = [status for status, following in NEXT_STATUSES.items() if to in following]
    if not allowed:
        return False  # `validating` is where a batch begins: nothing leads there
    values: dict[str, Any] = {"status": to, f"{to}_at": int(time.time())}
    if model is not None:
        values["model"] = model
    if to is BatchStatus.FAILED:
        values["errors"] = [dataclasses.asdict(fault) for fault in errors]
    if to.is_final:
        counts, usage = _derived(connection, batch_id)
        values["final_counts"] = dataclasses.asdict(counts) | dataclasses.asdict(usage)
        values["output_file_id"] = output_file_id
        values["error_file_id"] = error_file_id
    moved = connection.execute(
        update(batches)
        .where(batches.c.id == batch_id, batches.c.status.in_(allowed), owned)
        .values(**values)
    )
    if moved.rowcount == 1 and to.is_final:
        note_end(connection, batch_id, to, at=values[f"{to}_at"])
    return moved.rowcount == 1


def counting(batch_id: str) -> Select[Any]:
    """A row for each outcome of the batch's results; every poll asks it, so an index covers it."""
    return (
        select(
            results.c.outcome,
            func.count().label("num_lines"),
            func.sum(results.c.input_tokens).label("input_tokens"),
            func.sum(results.c.cached_tokens).label("cached_tokens"),
            func.sum(results.c.output_tokens).label("output_tokens"),
        )
        .where(results.c.batch_id == batch_id)
        .group_by(results.c.outcome)
    )


def _derived(connection: Connection, batch_id: str) -> tuple[RequestCounts, TokenUsage]:
    total = connection.execute(
        select(func.count()).select_from(lines).where(lines.c.batch_id == batch_id)
    ).scalar_one()
    rows = connection.execute(counting(batch_id)).all()
    by_outcome = {row.outcome: row for row in rows}
    counted = {outcome: row.num_lines for outcome, row in by_outcome.items()}
    return RequestCounts(
        total=total,
        completed=counted.get(Outcome.COMPLETED, 0),
        failed=counted.get(Outcome.FAILED, 0),
    ), TokenUsage(
        input_tokens=sum(row.input_tokens for row in by_outcome.values()),
        cached_tokens=sum(row.cached_tokens for row in by_outcome.values()),
        output_tokens=sum(row.output_tokens for row in by_outcome.values()),
    )


def _batch(connection: Connection, row: Row[Any]) -> Batch:
    if row.final_counts is not None:
        frozen = row.final_counts
        counts = RequestCounts(**{name: frozen[name] for name in ("total", "completed", "failed")})
        usage = TokenUsage(
            **{name: frozen[name] for name in ("input_tokens", "cached_tokens", "output_tokens")}
        )
    else:
        counts, usage = _derived(connection, row.id)
    seconds = row.output_expires_after_s
    plain = {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(Batch)
        if field.name in row._fields
    }
    converted: dict[str, Any] = {
        "endpoint": Endpoint(row.endpoint),
        "status": BatchStatus(row.status),
        "metadata": row.metadata,
        "errors": tuple(LineFault(**fault) for fault in row.errors),
        "output_expires_after": None if seconds is None else ExpiryPolicy(seconds=seconds),
        "request_counts": counts,
        "usage": usage,
        "options": read_options(connection, row.id),
        "estimate": None if row.final_counts else read_estimate(connection, row.id),
    }
    return Batch(**(plain | converted))
