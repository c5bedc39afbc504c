"""A ledger of an earlier version opens as one of today's, with all that was in it."""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, inspect, select

from jobs.batch import BatchStatus
from jobs.errors import NotFoundError
from jobs.ledger.batches import IdempotencyKey
from jobs.ledger.database import Database
from jobs.ledger.ledger import Ledger
from jobs.ledger.tables import METADATA, SCHEMA_VERSION, schema
from jobs.tenant import DEFAULT_TENANT, Caller

# Those tables of version 1 that have changed since, as it made them.
VERSION_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
CREATE TABLE files (
    seq INTEGER NOT NULL, id VARCHAR(64) NOT NULL, purpose VARCHAR(32) NOT NULL,
    filename TEXT NOT NULL, num_bytes BIGINT NOT NULL, created_at INTEGER NOT NULL,
    expires_at INTEGER, deleted_at INTEGER, PRIMARY KEY (seq), UNIQUE (id)
);
CREATE TABLE uploads (
    id VARCHAR(64) NOT NULL, purpose VARCHAR(32) NOT NULL, filename TEXT NOT NULL,
    mime_type TEXT NOT NULL, num_bytes BIGINT NOT NULL, created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL, file_lifetime_s INTEGER, status VARCHAR(16) NOT NULL,
    file_id VARCHAR(64), part_ids JSON NOT NULL, PRIMARY KEY (id)
);
CREATE INDEX uploads_by_status ON uploads (status, expires_at);
CREATE TABLE batches (
    seq INTEGER NOT NULL, id VARCHAR(64) NOT NULL, endpoint VARCHAR(64) NOT NULL,
    input_file_id VARCHAR(64) NOT NULL, completion_window VARCHAR(16) NOT NULL,
    status VARCHAR(16) NOT NULL, model TEXT, metadata JSON, output_expires_after_s INTEGER,
    errors JSON NOT NULL, output_file_id VARCHAR(64), error_file_id VARCHAR(64),
    created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, in_progress_at INTEGER,
    finalizing_at INTEGER, completed_at INTEGER, failed_at INTEGER, expired_at INTEGER,
    cancelling_at INTEGER, cancelled_at INTEGER, final_counts JSON,
    PRIMARY KEY (seq), UNIQUE (id)
);
CREATE INDEX ix_batches_status ON batches (status);
CREATE TABLE idempotency_keys (
    key VARCHAR(255) NOT NULL, digest VARCHAR(64) NOT NULL, batch_id VARCHAR(64) NOT NULL,
    PRIMARY KEY (key), FOREIGN KEY(batch_id) REFERENCES batches (id)
);
INSERT INTO schema_version VALUES (1);
INSERT INTO files VALUES (1, 'file-old', 'batch', 'f', 3, 5, NULL, NULL);
INSERT INTO uploads VALUES
    ('upload_old', 'batch', 'f', 't', 3, 5, 6, NULL, 'completed', 'file-old', '["part_x"]');
INSERT INTO batches (seq, id, endpoint, input_file_id, completion_window, status, errors,
    created_at, expires_at)
    VALUES (1, 'batch_old', '/v1/completions', 'file-old', '24h', 'validating', '[]', 5, 6);
INSERT INTO idempotency_keys VALUES ('k', 'd', 'batch_old');
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of a ledger of version 1."""
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.executescript(VERSION_1)
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    with contextlib.closing(Ledger.open(url)) as ledger:
        yield ledger


def test_everything_is_there_and_the_default_tenants(ledger: Ledger) -> None:
    theirs = ledger.seen_by(Caller(tenant=DEFAULT_TENANT))
    assert theirs.files.get("file-old").num_bytes == 3
    assert theirs.uploads.get("upload_old").part_ids == ("part_x",)
    batch = theirs.batches.get("batch_old")
    assert (batch.status, batch.max_enqueued_lines) == (BatchStatus.VALIDATING, None)
    assert theirs.batches.of_key(IdempotencyKey(key="k", digest="d")) == batch
    assert not ledger.keys.exist()


def test_another_tenant_sees_nothing_of_it(ledger: Ledger) -> None:
    other = ledger.seen_by(Caller(tenant="other"))
    for refused in (
        lambda: other.files.get("file-old"),
        lambda: other.uploads.get("upload_old"),
        lambda: other.batches.get("batch_old"),
    ):
        with pytest.raises(NotFoundError):
            refused()
    assert other.batches.of_key(IdempotencyKey(key="k", digest="d")) is None


def layout(connection: Connection) -> dict[str, Any]:
    """All that the tables of the database are made of, whatever the order."""
    inspector = inspect(connection)
    return {
        name: (
            sorted(
                (column["name"], str(column["type"]), column["nullable"], column["default"])
                for column in inspector.get_columns(name)
            ),
            inspector.get_pk_constraint(name)["constrained_columns"],
            sorted(
                (str(index["name"]), tuple(index["column_names"]))
                for index in inspector.get_indexes(name)
            ),
            sorted(tuple(key["constrained_columns"]) for key in inspector.get_foreign_keys(name)),
        )
        for name in inspector.get_table_names()
    }


def test_it_is_laid_out_like_a_new_one(url: str, tmp_path: Path) -> None:
    found = []
    for each in (url, f"sqlite:///{tmp_path / 'new.db'}"):
        database = Database.open(each)
        with database.reading() as connection:
            found.append(layout(connection))
            assert connection.execute(select(schema.c.version)).scalar() == SCHEMA_VERSION
        database.close()
    assert found[0] == found[1]
    assert set(found[0]) == set(METADATA.tables)


def test_those_who_open_it_at_once_all_succeed(url: str) -> None:
    start, opened = threading.Barrier(3), []

    def run() -> None:
        start.wait()
        with contextlib.closing(Ledger.open(url)) as ledger:
            opened.append(ledger.batches.get("batch_old").id)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == ["batch_old"] * 3


def test_what_fails_on_the_way_leaves_it_as_it_was(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Connection) -> None:
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr("jobs.ledger.migrations._add_missing_columns", fail)
        with pytest.raises(RuntimeError, match="lost"):
            Ledger.open(url)
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(1,)]
        assert connection.execute("SELECT key FROM idempotency_keys").fetchall() == [("k",)]
    with contextlib.closing(Ledger.open(url)) as ledger:
        assert ledger.batches.get("batch_old").id == "batch_old"
