"""Who asks: tenants, the keys that stand for them, and how far a key may drive what is its tenant's."""

import dataclasses
import hashlib
import hmac
import re
import secrets
from typing import Final

DEFAULT_TENANT: Final = "default"
"""Whose everything is that was made without a key."""
MAX_NAME_CHARACTERS: Final = 100
_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID_PREFIX: Final = "key_"
_SECRET_PREFIX: Final = "sk-freight-"  # noqa: S105 - what every secret begins with is none
_ID_BYTES: Final = 8
_SECRET_BYTES: Final = 32
_SECRET: Final = re.compile(rf"{_SECRET_PREFIX}([0-9a-f]{{{2 * _ID_BYTES}}})-[A-Za-z0-9_-]+")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Counted over all that is the tenant's, whichever of its keys asks. None: no limit."""

    stored_bytes: int | None = None
    """Of files, result files too, and of parts of uploads that are under way."""
    batches_per_hour: int | None = None
    """Made within any 3,600 seconds, whatever became of them."""
    enqueued_lines: int | None = None
    """On the worker's queue or in its block; those over it wait, at least one shard goes ahead."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """On whose behalf something is asked. Without any key in the ledger: everyone, unlimited."""

    tenant: str = DEFAULT_TENANT
    limits: Limits = dataclasses.field(default_factory=Limits)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key's record. `id` is public; of the secret only a digest is kept, elsewhere."""

    id: str
    name: str
    tenant: str
    created_at: int
    limits: Limits
    revoked_at: int | None = None

    @property
    def caller(self) -> Caller:
        return Caller(tenant=self.tenant, limits=self.limits)


def new_key_id() -> str:
    return f"{_ID_PREFIX}{secrets.token_hex(_ID_BYTES)}"


def new_secret(key_id: str) -> str:
    """What a client shows: it tells the key's id, beside 256 random bits."""
    public = key_id.removeprefix(_ID_PREFIX)
    return f"{_SECRET_PREFIX}{public}-{secrets.token_urlsafe(_SECRET_BYTES)}"


def key_id_of(secret: str) -> str | None:
    """The id that the secret tells; None for what cannot be one of ours."""
    match = _SECRET.fullmatch(secret)
    return None if match is None else f"{_ID_PREFIX}{match[1]}"


def digest_of(secret: str) -> str:
    """A fast hash, on purpose: slow ones protect words that people choose. Nobody guesses 256
    random bits, however fast each try is, and this is computed for every request.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def is_secret_of(secret: str, digest: str) -> bool:
    """Takes equally long wherever the two digests differ."""
    return hmac.compare_digest(digest_of(secret), digest)


def checked_tenant(text: str) -> str:
    """Raises ValueError."""
    if _TENANT.fullmatch(text) is None:
        raise ValueError(
            f"{text!r} is no name of a tenant; "
            "write 1 to 64 letters, digits, dots, dashes or underscores"
        )
    return text


def checked_name(text: str) -> str:
    """Raises ValueError."""
    if not text.strip() or len(text) > MAX_NAME_CHARACTERS or not text.isprintable():
        raise ValueError(
            f"{text!r} is no name of a key; write 1 to {MAX_NAME_CHARACTERS} printable characters"
        )
    return text
