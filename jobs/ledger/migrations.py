"""How an older ledger becomes one of today, version by version, in the opener's one transaction."""

from collections.abc import Callable, Mapping
from typing import Final

from sqlalchemy import Connection, inspect
from sqlalchemy.schema import CreateColumn

from jobs.ledger.tables import METADATA, SCHEMA_VERSION, idempotency_keys


def migrate(connection: Connection, version: int) -> None:
    """Bring the schema from `version` to today's."""
    for each in range(version, SCHEMA_VERSION):
        if each in STEPS:
            STEPS[each](connection)
    METADATA.create_all(connection)
    _add_missing_columns(connection)
    _add_missing_indexes(connection)


def _rekey_idempotency(connection: Connection) -> None:
    """Version 2: a client's own keys are its tenant's; a primary key cannot be altered in place."""
    connection.exec_driver_sql("ALTER TABLE idempotency_keys RENAME TO idempotency_keys_1")
    idempotency_keys.create(connection)
    connection.exec_driver_sql(
        "INSERT INTO idempotency_keys (tenant, key, digest, batch_id) "
        "SELECT 'default', key, digest, batch_id FROM idempotency_keys_1"
    )
    connection.exec_driver_sql("DROP TABLE idempotency_keys_1")


def _add_missing_columns(connection: Connection) -> None:
    """What may be null, or says itself what older rows have in it."""
    for table in METADATA.sorted_tables:
        there = {column["name"] for column in inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                written = CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {written}")


def _add_missing_indexes(connection: Connection) -> None:
    for table in METADATA.sorted_tables:
        there = {index["name"] for index in inspect(connection).get_indexes(table.name)}
        for index in table.indexes:
            if index.name not in there:
                index.create(connection)


STEPS: Final[Mapping[int, Callable[[Connection], None]]] = {1: _rekey_idempotency}
"""From a version to the next: only what is more than new tables, columns and indexes."""
