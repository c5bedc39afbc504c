"""The ledger's API keys: made, listed, revoked, and recognized by their secrets."""

import dataclasses
import time
from typing import Any

from sqlalchemy import Row, insert, select, update

from jobs.errors import NotFoundError
from jobs.ledger.database import Database
from jobs.ledger.tables import api_keys
from jobs.tenant import (
    Caller,
    Key,
    Limits,
    digest_of,
    is_secret_of,
    key_id_of,
    new_key_id,
    new_secret,
)


class KeyRecords:
    """Records stay for good: revoking the last key shuts everybody out, and lets nobody in."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, *, name: str, tenant: str, limits: Limits) -> tuple[Key, str]:
        """The key and its secret, which is nowhere else and cannot be told again."""
        key = Key(
            id=new_key_id(), name=name, tenant=tenant, created_at=int(time.time()), limits=limits
        )
        secret = new_secret(key.id)
        row = {
            "id": key.id,
            "name": key.name,
            "tenant": key.tenant,
            "digest": digest_of(secret),
            "created_at": key.created_at,
            **{f"max_{name}": limit for name, limit in dataclasses.asdict(limits).items()},
        }
        with self._database.writing() as connection:
            connection.execute(insert(api_keys).values(**row))
        return key, secret

    def all(self) -> list[Key]:
        """Oldest first, revoked ones too."""
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        with self._database.reading() as connection:
            return [_key(row) for row in connection.execute(query).all()]

    def revoke(self, key_id: str) -> bool:
        """Whether it was good until now. Raises NotFoundError."""
        mine = api_keys.c.id == key_id
        with self._database.writing() as connection:
            moved = connection.execute(
                update(api_keys)
                .where(mine, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=int(time.time()))
            )
            known = connection.execute(select(api_keys.c.id).where(mine)).scalar()
        if known is None:
            raise NotFoundError(f"No API key found with id '{key_id}'.", param="id")
        return moved.rowcount == 1

    def exist(self) -> bool:
        """Whether any was ever made: from then on nothing is answered without one."""
        with self._database.reading() as connection:
            return connection.execute(select(api_keys.c.id).limit(1)).scalar() is not None

    def caller_of(self, secret: str) -> Caller | None:
        """Whom the secret stands for; None if it is no key's, or was revoked."""
        key_id = key_id_of(secret)
        if key_id is None:
            return None
        with self._database.reading() as connection:
            query = select(api_keys).where(api_keys.c.id == key_id)
            row = connection.execute(query).one_or_none()
        if row is None or not is_secret_of(secret, row.digest) or row.revoked_at is not None:
            return None
        return _key(row).caller


def _key(row: Row[Any]) -> Key:
    return Key(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        created_at=row.created_at,
        limits=Limits(
            stored_bytes=row.max_stored_bytes,
            batches_per_hour=row.max_batches_per_hour,
            enqueued_lines=row.max_enqueued_lines,
        ),
        revoked_at=row.revoked_at,
    )
