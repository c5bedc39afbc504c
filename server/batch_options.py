"""What a body may ask of a batch beyond the contract: read, checked and refused in its words."""

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any, Final

from jobs import values
from jobs.batch import BatchOptions
from jobs.settings import Settings
from jobs.webhook import MAX_URL_CHARACTERS, Webhook, check_secret, check_url
from server import refusals

MAX_PRIORITY: Final = 100
MIN_LIFETIME_S: Final = 60
MAX_LIFETIME_S: Final = 86_400
_WEBHOOK: Final = ("url", "secret")
_URL: Final = r"^https?://[A-Za-z0-9][A-Za-z0-9.-]*(:[1-9][0-9]{0,3})?(/[!-~]*)?$"
_FOUR: Final = "[A-Za-z0-9+/]{4}"
_SECRET: Final = f"^whsec_({_FOUR}){{5,20}}({_FOUR}|[A-Za-z0-9+/]{{3}}=|[A-Za-z0-9+/]{{2}}==)$"

OPTION_SCHEMAS: Final[dict[str, Any]] = {
    "priority": {"type": ["integer", "null"], "minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY},
    "expires_after": refusals.expiry_schema(minimum=MIN_LIFETIME_S, maximum=MAX_LIFETIME_S),
    "webhook": {
        "type": ["object", "null"],
        "required": ["url"],
        "additionalProperties": False,
        "properties": {
            "url": {"type": "string", "maxLength": MAX_URL_CHARACTERS, "pattern": _URL},
            "secret": {"type": ["string", "null"], "pattern": _SECRET},
        },
    },
}
"""What `parse_options` accepts, for the OpenAPI page; it also takes IPv6 hosts and higher ports."""


def parse_options(data: Mapping[str, Any]) -> BatchOptions:
    """Raises InvalidRequestError for the first fault."""
    return BatchOptions(
        priority=values.integer(data, "priority", low=-MAX_PRIORITY, high=MAX_PRIORITY) or 0,
        expires_after_s=refusals.expiry_policy_s(
            data.get("expires_after"),
            "expires_after",
            minimum=MIN_LIFETIME_S,
            maximum=MAX_LIFETIME_S,
        ),
        webhook=_webhook(data.get("webhook")),
    )


def check_webhook(webhook: Webhook | None, settings: Settings) -> None:
    """Whether this installation can tell it, as far as that can be said without asking for names.

    Raises InvalidRequestError.
    """
    if webhook is None:
        return
    if webhook.secret is None and settings.webhook_secret is None:
        raise values.missing("webhook.secret")
    host = check_url(webhook.url).hostname
    assert host is not None
    try:
        address = str(ipaddress.ip_address(host))
    except ValueError:
        return  # a name: what it means is looked at when it is called
    if not settings.webhook_networks.allow(address):
        raise values.invalid_value("webhook.url", f"the address {address} may not be called")


def _webhook(value: object) -> Webhook | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise values.wrong_type("webhook", "an object", value)
    for key in value:
        if key not in _WEBHOOK:
            raise values.unknown(f"webhook.{key}")
    if value.get("url") is None:
        raise values.missing("webhook.url")
    secret = value.get("secret")
    return Webhook(
        url=_checked(value["url"], "webhook.url", check_url),
        secret=None if secret is None else _checked(secret, "webhook.secret", check_secret),
    )


def _checked(value: object, param: str, check: Callable[[str], object]) -> str:
    if not isinstance(value, str):
        raise values.wrong_type(param, "a string", value)
    try:
        check(value)
    except ValueError as error:
        raise values.invalid_value(param, str(error)) from error
    return value
