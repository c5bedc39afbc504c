"""Webhooks in OpenAI's format: who is told, of what, in which words and how signed; sends nothing."""

import base64
import binascii
import dataclasses
import enum
import hashlib
import hmac
import json
import re
from typing import Final
from urllib.parse import SplitResult, urlsplit

MAX_URL_CHARACTERS: Final = 2_048
_PREFIX: Final = "whsec_"
_SECRET_BYTES: Final = range(16, 65)
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]*")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Where to, and the secret to sign with; None: the installation's."""

    url: str
    secret: str | None = dataclasses.field(default=None, repr=False)


class Listener(enum.StrEnum):
    """Who may want to know of a batch's end."""

    INSTALLATION = "installation"  # whoever the settings name
    BATCH = "batch"  # whoever its maker named


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One event that is due to one listener, after `num_tries` attempts. Times are Unix seconds.

    `webhook` is the batch's own, None for the installation's.
    """

    batch_id: str
    listener: Listener
    event: str
    created_at: int
    due_at: float
    num_tries: int = 0
    webhook: Webhook | None = None

    @property
    def id(self) -> str:
        """The same for each attempt, so that who hears twice can tell."""
        return f"wh_{_digest(self.listener, self.batch_id)}"

    @property
    def body(self) -> bytes:
        event = {
            "id": f"evt_{_digest('event', self.batch_id)}",
            "object": "event",
            "type": self.event,
            "created_at": self.created_at,
            "data": {"id": self.batch_id},
        }
        return json.dumps(event, separators=(",", ":")).encode("ascii")


def signed_headers(delivery: Delivery, *, secret: str, at: int) -> dict[str, str]:
    """The three headers by which a receiver tells that it was us, and when: `at`."""
    signed = f"{delivery.id}.{at}.".encode() + delivery.body
    signature = hmac.new(_key(secret), signed, hashlib.sha256).digest()
    return {
        "webhook-id": delivery.id,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }


def check_secret(secret: str) -> None:
    """Raises ValueError, which does not quote it."""
    form = f"'{_PREFIX}' and base64 of {_SECRET_BYTES[0]} to {_SECRET_BYTES[-1]} bytes"
    if not secret.startswith(_PREFIX) or not secret.isascii():
        raise ValueError(f"a webhook's secret is {form}")
    try:
        num_bytes = len(_key(secret))
    except binascii.Error:
        raise ValueError(f"a webhook's secret is {form}; this is not base64") from None
    if num_bytes not in _SECRET_BYTES:
        raise ValueError(f"a webhook's secret is {form}; this is of {num_bytes}")


def check_url(url: str) -> SplitResult:
    """Its parts. Raises ValueError, saying what is wrong."""
    if len(url) > MAX_URL_CHARACTERS:
        raise ValueError(f"it has {len(url)} characters; the limit is {MAX_URL_CHARACTERS}")
    if _PRINTABLE.fullmatch(url) is None:
        raise ValueError("it may hold printable ASCII characters only")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it must begin with http:// or https:// and a host")
    if "@" in parts.netloc:
        raise ValueError("it may hold no user and no password")
    if parts.port == 0:  # asking for it raises ValueError for what is no port
        raise ValueError("0 is not a port")
    return parts


def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)


def _digest(kind: str, batch_id: str) -> str:
    # Derived, not drawn: an attempt after a crash is told as the same one.
    return hashlib.sha256(f"{kind}:{batch_id}".encode()).hexdigest()[:32]
