"""The ledger's options of batches: what some ask beyond the contract."""

from sqlalchemy import Connection, insert, select

from jobs.batch import Batch, BatchOptions
from jobs.ledger.tables import batch_options
from jobs.webhook import Webhook


def insert_options(connection: Connection, batch: Batch) -> None:
    """Beside the batch's own row, in the same transaction; nothing for one that asks nothing."""
    options = batch.options
    if options == BatchOptions():
        return
    hook = options.webhook
    connection.execute(
        insert(batch_options).values(
            batch_id=batch.id,
            priority=options.priority,
            expires_after_s=options.expires_after_s,
            webhook_url=None if hook is None else hook.url,
            webhook_secret=None if hook is None else hook.secret,
            retry_of=options.retry_of,
        )
    )


def read_options(connection: Connection, batch_id: str) -> BatchOptions:
    query = select(batch_options).where(batch_options.c.batch_id == batch_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        return BatchOptions()
    url = row.webhook_url
    return BatchOptions(
        priority=row.priority,
        expires_after_s=row.expires_after_s,
        webhook=None if url is None else Webhook(url=url, secret=row.webhook_secret),
        retry_of=row.retry_of,
    )
