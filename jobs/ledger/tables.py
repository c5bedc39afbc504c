"""The ledger's schema: its tables, its version, and nothing of who asks."""

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

from jobs.tenant import DEFAULT_TENANT

SCHEMA_VERSION: Final = 2
"""Higher with every change of a table; `jobs.ledger.migrations` brings older ledgers along. Tables
that are only new are made at every start and need none.
"""
METADATA: Final = MetaData()

schema = Table("schema_version", METADATA, Column("version", Integer, nullable=False))


def _tenant() -> Column[str]:
    """Whose a row is. What was there before there were tenants is the default one's."""
    return Column("tenant", String(64), nullable=False, server_default=DEFAULT_TENANT)


# `digest` is the secret's, which is nowhere. A revoked key keeps its row.
api_keys = Table(
    "api_keys",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("revoked_at", Integer),
    Column("max_stored_bytes", BigInteger),
    Column("max_batches_per_hour", Integer),
    Column("max_enqueued_lines", Integer),
)

# `seq` orders lists: two objects of the same second neither repeat nor vanish between pages.
# A deleted file keeps its row, so that a page after it can still be found.
files = Table(
    "files",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("expires_at", Integer),
    Column("deleted_at", Integer),
    _tenant(),
    Index("files_by_tenant", "tenant", "seq"),
)

# Uploads and their parts. A part's row goes with its bytes; an upload's stays.
uploads = Table(
    "uploads",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("expires_at", Integer, nullable=False),
    Column("file_lifetime_s", Integer),
    Column("status", String(16), nullable=False),
    Column("file_id", String(64)),
    Column("part_ids", JSON, nullable=False),
    _tenant(),
    Index("uploads_by_status", "status", "expires_at"),
    Index("uploads_by_tenant", "tenant", "status"),
)

upload_parts = Table(
    "upload_parts",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("upload_id", String(64), ForeignKey("uploads.id"), nullable=False, index=True),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", Integer, nullable=False),
)

batches = Table(
    "batches",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("model", Text),
    Column("metadata", JSON),
    Column("output_expires_after_s", Integer),
    Column("errors", JSON, nullable=False),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("created_at", Integer, nullable=False),
    Column("expires_at", Integer, nullable=False),
    *(
        Column(f"{status}_at", Integer)
        for status in (
            "in_progress",
            "finalizing",
            "completed",
            "failed",
            "expired",
            "cancelling",
            "cancelled",
        )
    ),
    # Written when the batch ends; until then counts are derived from `results`.
    Column("final_counts", JSON),
    _tenant(),
    Column("max_enqueued_lines", Integer),
    Index("batches_by_tenant", "tenant", "seq"),
)

# What some batches ask beyond the contract; most have no row here.
batch_options = Table(
    "batch_options",
    METADATA,
    Column("batch_id", String(64), ForeignKey("batches.id"), primary_key=True),
    Column("priority", Integer, nullable=False),
    Column("expires_after_s", Integer),
    Column("webhook_url", Text),
    Column("webhook_secret", Text),
    Column("retry_of", String(64)),
)

# Who is still to be told of a batch's end: a row comes with the status and goes with the delivery.
webhook_deliveries = Table(
    "webhook_deliveries",
    METADATA,
    Column("batch_id", String(64), ForeignKey("batches.id"), nullable=False),
    Column("listener", String(16), nullable=False),
    Column("event", String(32), nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("due_at", Float, nullable=False, index=True),
    Column("num_tries", Integer, nullable=False),
    PrimaryKeyConstraint("batch_id", "listener"),
)

# Which batch a client's own key stands for, and the digest of what it asked for then.
idempotency_keys = Table(
    "idempotency_keys",
    METADATA,
    Column("tenant", String(64), nullable=False),
    Column("key", String(255), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("batch_id", String(64), ForeignKey("batches.id"), nullable=False),
    PrimaryKeyConstraint("tenant", "key"),
)

lines = Table(
    "lines",
    METADATA,
    Column("batch_id", String(64), ForeignKey("batches.id"), nullable=False),
    Column("line_index", Integer, nullable=False),
    Column("custom_id", Text, nullable=False),
    Column("offset_bytes", Integer, nullable=False),
    Column("num_bytes", Integer, nullable=False),
    Column("num_prompt_tokens", Integer, nullable=False),
    Column("shard_index", Integer, nullable=False),
    PrimaryKeyConstraint("batch_id", "line_index"),
    Index("lines_by_shard", "batch_id", "shard_index"),
)

shards = Table(
    "shards",
    METADATA,
    Column("batch_id", String(64), ForeignKey("batches.id"), nullable=False),
    Column("shard_index", Integer, nullable=False),
    Column("state", String(8), nullable=False),
    PrimaryKeyConstraint("batch_id", "shard_index"),
    Index("shards_by_state", "batch_id", "state", "shard_index"),
)

# Ordered by an index, not WITHOUT ROWID: there whole rows stand in every node of the tree, four to
# a page, and it grows deep.
results = Table(
    "results",
    METADATA,
    Column("batch_id", String(64), ForeignKey("batches.id"), nullable=False),
    Column("line_index", Integer, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("row", Text, nullable=False),
    Column("input_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    PrimaryKeyConstraint("batch_id", "line_index"),
    # All that progress is derived from: counting reads no row's text.
    Index(
        "results_by_outcome",
        "batch_id",
        "outcome",
        "input_tokens",
        "cached_tokens",
        "output_tokens",
    ),
)

# A batch's lines summed up by like size (`jobs.line_group`): a plan never reads the lines themselves.
line_groups = Table(
    "line_groups",
    METADATA,
    Column("batch_id", String(64), ForeignKey("batches.id"), nullable=False),
    Column("group_index", Integer, nullable=False),
    Column("num_lines", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("shared_tokens", BigInteger, nullable=False),
    Column("limit_tokens", BigInteger, nullable=False),
    PrimaryKeyConstraint("batch_id", "group_index"),
)

# Requests outside batches, while somebody waits for them. The row goes when they have their answer;
# what they asked goes before, when the answer is there.
riders = Table(
    "riders",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("server_id", String(64), nullable=False),
    Column("party_id", String(64), nullable=False, index=True),
    Column("endpoint", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("status_code", Integer),
    Column("answer", Text),
    Index("riders_by_server", "server_id", "status_code"),
)

# How fast a model's worker goes, and what follows from it for each live batch: told, never relied on.
paces = Table(
    "paces",
    METADATA,
    Column("model_id", String(255), primary_key=True),
    Column("tokens_per_s", Float),
    Column("predicted_tokens_per_s", Float),
)

estimates = Table(
    "estimates",
    METADATA,
    Column("batch_id", String(64), ForeignKey("batches.id"), primary_key=True),
    Column("noted_at", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("tokens_per_s", Float),
    Column("seconds_left", Float),
)

models = Table(
    "models",
    METADATA,
    Column("id", String(255), primary_key=True),
    Column("created_at", Integer, nullable=False),
    Column("max_context_tokens", Integer, nullable=False),
)
