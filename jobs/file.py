"""What a file is: its record and its purposes; its bytes live in a file store."""

import dataclasses
import enum
import secrets

from jobs.tenant import DEFAULT_TENANT


class Purpose(enum.StrEnum):
    """What an upload may be for, and `BATCH_OUTPUT` for the result files that Freight writes."""

    ASSISTANTS = "assistants"
    BATCH = "batch"
    FINE_TUNE = "fine-tune"
    VISION = "vision"
    USER_DATA = "user_data"
    EVALS = "evals"
    BATCH_OUTPUT = "batch_output"


UPLOAD_PURPOSES = tuple(purpose for purpose in Purpose if purpose is not Purpose.BATCH_OUTPUT)
BATCH_FILE_LIFETIME_S = 30 * 86_400
MAX_FILE_BYTES = 512 * 2**20
"""Sent in one request, for any purpose; files for batches have a limit of their own."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file's record. `id` is also its name in the file store."""

    id: str
    purpose: Purpose
    filename: str
    num_bytes: int
    created_at: int
    expires_at: int | None
    tenant: str = DEFAULT_TENANT


def new_file_id() -> str:
    return f"file-{secrets.token_urlsafe(18).replace('-', 'A').replace('_', 'B')}"
