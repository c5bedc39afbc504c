"""Whether the server may listen where it is told: beyond this machine only with a key, or on request."""

import ipaddress

from jobs.errors import SettingsError
from jobs.ledger.keys import KeyRecords
from jobs.settings import Settings


def check_exposure(settings: Settings, keys: KeyRecords) -> bool:
    """Whether there are keys. Raises SettingsError if anybody in reach could use the server."""
    if keys.exist():
        return True
    if not settings.allow_keyless and not is_loopback(settings.host):
        raise SettingsError(
            f"FREIGHT_HOST={settings.host!r}: there is no API key yet, so everybody who reaches "
            "that address could use this server. Make a key with `freight keys create NAME`, "
            "listen on 127.0.0.1, or set FREIGHT_ALLOW_KEYLESS=true if something in front of it "
            "keeps others out."
        )
    return False


def is_loopback(host: str) -> bool:
    """Names other than `localhost` count as not: who knows what they stand for tomorrow."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
