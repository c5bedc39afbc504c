"""A rider: one request outside batches, which joins the block beside their lines; knows no HTTP."""

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from jobs.batch import Endpoint


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rider:
    """`body` is what a line of a batch would have. Nobody waits after `expires_at`, Unix seconds."""

    id: str
    endpoint: Endpoint
    model: str
    body: Mapping[str, Any]
    expires_at: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RiderAnswer:
    """`body` is JSON text: what a line's `response.body` would be, an error where the status is one."""

    rider_id: str
    status_code: int
    body: str


def new_rider_id() -> str:
    return f"rider_{secrets.token_hex(16)}"


def new_party_id() -> str:
    """Of riders that are recorded and rung for together."""
    return f"party_{secrets.token_hex(16)}"
