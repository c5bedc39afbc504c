"""One SQL database behind the ledger: opening, transactions, dialect differences; no domain."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Insert,
    Table,
    create_engine,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from jobs.errors import LedgerError
from jobs.ledger.migrations import migrate
from jobs.ledger.tables import METADATA, SCHEMA_VERSION, schema

_WRITES = "freight_writes"
_BUSY_TIMEOUT_S = 60


class Database:
    """A pool of connections. `reading` sees one snapshot; `writing` is one durable transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(**{_WRITES: True})

    @classmethod
    def open(cls, url: str) -> "Database":
        """Open and, if empty, lay out the schema. Raises LedgerError: it says what is wrong."""
        parsed = _parsed(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        try:
            engine = create_engine(parsed)
            if engine.dialect.name == "sqlite":
                _prepare_sqlite(engine)
            database = cls(engine)
            database._lay_out()
        except ModuleNotFoundError as error:
            raise LedgerError(_no_driver(parsed, error)) from error
        except SQLAlchemyError as error:
            raise LedgerError(f"the ledger {parsed!r} cannot be opened: {error}") from error
        return database

    def _lay_out(self) -> None:
        with self.writing() as connection:
            schema.create(connection, checkfirst=True)
            # Locked: of several that open an older ledger at once, one brings it up to date.
            version = connection.execute(select(schema.c.version).with_for_update()).scalar()
            if version is not None and version > SCHEMA_VERSION:
                raise LedgerError(
                    f"the ledger has schema version {version}, this Freight knows {SCHEMA_VERSION}"
                )
            if version is not None and version < SCHEMA_VERSION:
                migrate(connection, version)
                connection.execute(update(schema).values(version=SCHEMA_VERSION))
            METADATA.create_all(connection)
            if version is None:
                connection.execute(insert(schema).values(version=SCHEMA_VERSION))

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self, *, alone: str | None = None) -> Iterator[Connection]:
        """With a word in `alone`, no other transaction with that word runs meanwhile: what one
        counts before it adds to it stays counted.
        """
        with self._writer.begin() as connection:
            # SQLite has one writer at a time anyway.
            if alone is not None and self._engine.dialect.name == "postgresql":
                word = func.hashtextextended(alone, 0)
                connection.execute(select(func.pg_advisory_xact_lock(word)))
            yield connection

    def insert_or_ignore(self, table: Table) -> Insert:
        """An insert that leaves a row of the same key as it is: the first result wins."""
        if self._engine.dialect.name == "postgresql":
            return postgresql.insert(table).on_conflict_do_nothing()
        return sqlite.insert(table).on_conflict_do_nothing()

    def close(self) -> None:
        self._engine.dispose()


def _parsed(url: str) -> URL:
    """Names no part of a URL that cannot be read: there is no telling where its password is."""
    try:
        return make_url(url)
    except (SQLAlchemyError, ValueError) as error:
        raise LedgerError(
            "the ledger's URL cannot be read; write it like sqlite:////folder/ledger.db "
            "or postgresql+psycopg://user:password@host:5432/database"
        ) from error


def _no_driver(url: URL, error: ModuleNotFoundError) -> str:
    advice = ": pip install 'psycopg[binary]'" if error.name == "psycopg" else ""
    return f"the ledger {url!r} needs a driver that is not installed, {error.name}{advice}"


def _prepare_sqlite(engine: Engine) -> None:
    def connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # BEGIN is ours, below
        for pragma in (
            f"busy_timeout = {_BUSY_TIMEOUT_S * 1000}",
            "journal_mode = WAL",
            "synchronous = FULL",  # a counted result survives a power cut
            "foreign_keys = ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    def begin(connection: Connection) -> None:
        # A writer takes the lock at once: upgrading a read snapshot later can fail as busy.
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begin)
