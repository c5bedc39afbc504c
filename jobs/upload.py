"""What an upload is: a file that comes in parts; its record, its statuses and its limits."""

import dataclasses
import enum
import secrets
from typing import Final

from jobs.file import Purpose
from jobs.tenant import DEFAULT_TENANT

UPLOAD_LIFETIME_S: Final = 3_600
MAX_PART_BYTES: Final = 64 * 2**20
MAX_UPLOAD_BYTES: Final = 8 * 2**30
MAX_PARTS: Final = 10_000
PART_PREFIX: Final = "part_"
PURPOSES: Final = (Purpose.ASSISTANTS, Purpose.BATCH, Purpose.FINE_TUNE, Purpose.VISION)


class UploadStatus(enum.StrEnum):
    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file announced, with its size. Times are Unix seconds.

    `file_lifetime_s` None: the file will be kept until it is deleted.
    """

    id: str
    purpose: Purpose
    filename: str
    mime_type: str
    num_bytes: int
    created_at: int
    expires_at: int
    file_lifetime_s: int | None
    status: UploadStatus = UploadStatus.PENDING
    file_id: str | None = None
    part_ids: tuple[str, ...] = ()
    """The parts that the file was made of, in its order; empty until it is."""
    tenant: str = DEFAULT_TENANT


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part's record. `id` is also its name in the file store, for as long as it is needed."""

    id: str
    upload_id: str
    num_bytes: int
    created_at: int


def new_upload_id() -> str:
    return f"upload_{secrets.token_hex(16)}"


def new_part_id() -> str:
    return f"{PART_PREFIX}{secrets.token_hex(16)}"
