"""Who asks, by the key that a request shows, and what is answered to one that shows none or a wrong one."""

from typing import Final

from jobs.errors import RequestError
from jobs.ledger.keys import KeyRecords
from jobs.tenant import Caller

_SHOWN_CHARACTERS: Final = (8, 4)
_MOST_STARS: Final = 16


class UnauthorizedError(RequestError):
    """No key that is good here."""


def caller_of(secret: str | None, keys: KeyRecords) -> Caller:
    """Asks the ledger each time, so that a key made or revoked is so at once.

    Raises UnauthorizedError. As long as there never was a key, everybody is the default tenant.
    """
    caller = None if secret is None else keys.caller_of(secret)
    if caller is not None:
        return caller
    if not keys.exist():
        return Caller()
    raise _missing() if secret is None else _incorrect(secret)


def _missing() -> UnauthorizedError:
    return UnauthorizedError(
        "You didn't provide an API key. You need to provide your API key in an Authorization "
        "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY). Whoever runs this server "
        "can make one with `freight keys create`."
    )


def _incorrect(secret: str) -> UnauthorizedError:
    return UnauthorizedError(
        f"Incorrect API key provided: {_masked(secret)}. Whoever runs this server can make one "
        "with `freight keys create`.",
        code="invalid_api_key",
    )


def _masked(secret: str) -> str:
    """Enough of it to tell which key it was, too little to be one."""
    first, last = _SHOWN_CHARACTERS
    num_hidden = len(secret) - first - last
    if num_hidden < first + last:
        return "*" * min(len(secret), _MOST_STARS)
    return f"{secret[:first]}{'*' * min(num_hidden, _MOST_STARS)}{secret[-last:]}"
