"""Every refusal that reaches a user, as a tree; how each becomes HTTP is the server's table.

FreightError
├── SettingsError          a FREIGHT_* variable is wrong (start refused)
├── LedgerError            the ledger cannot be used: newer schema, unreachable
└── RequestError           a client's request is refused: message, param, code
    ├── InvalidRequestError  the request itself is wrong
    ├── NotFoundError        no such object
    ├── ConflictError        the object's state forbids it
    ├── TooLargeError        over a stated limit
    └── RateLimitError       too much of it for now: retry_after_s
        └── QuotaError         and until its caller makes room
"""


class FreightError(Exception):
    """Base of the tree; the message is fit to be shown."""


class SettingsError(FreightError):
    """A setting is wrong."""


class LedgerError(FreightError):
    """The ledger cannot be used."""


class RequestError(FreightError):
    """A client's request is refused; `param` and `code` follow the wire contract."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequestError(RequestError):
    """The request itself is wrong."""


class NotFoundError(RequestError):
    """No such object."""


class ConflictError(RequestError):
    """The object's state forbids the request."""


class TooLargeError(RequestError):
    """Over a stated limit."""


class RateLimitError(RequestError):
    """Too much of it for now; in `retry_after_s` it is allowed again, None: waiting helps nothing."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class QuotaError(RateLimitError):
    """What is kept for the caller has grown to its limit; it has to make room first."""
