"""How refusals and faults become HTTP: one table, and handlers that leave no framework default."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from jobs import values
from jobs.errors import (
    ConflictError,
    FreightError,
    InvalidRequestError,
    LedgerError,
    NotFoundError,
    QuotaError,
    RateLimitError,
    RequestError,
    TooLargeError,
)
from jobs.openai import ErrorBody, ErrorEnvelope
from server import refusals
from server.auth import UnauthorizedError
from server.pace import StalledBodyError
from server.waiting_room import StoppingError, WaitOverError

_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"
_MAX_RETRY_AFTER_S: Final = 120


class RangeError(RequestError):
    """No byte of the asked range is in the file."""

    def __init__(self, message: str, *, num_bytes: int) -> None:
        super().__init__(message)
        self.num_bytes = num_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    status: int
    type: str = _INVALID


_ANSWERS: Final[Mapping[type[Exception], _Answer]] = {
    InvalidRequestError: _Answer(status=400),
    UnauthorizedError: _Answer(status=401),
    NotFoundError: _Answer(status=404),
    StalledBodyError: _Answer(status=408),
    ConflictError: _Answer(status=409),
    TooLargeError: _Answer(status=413),
    refusals.ContentTypeError: _Answer(status=415),
    RangeError: _Answer(status=416),
    RateLimitError: _Answer(status=429, type="requests"),
    QuotaError: _Answer(status=429, type="insufficient_quota"),
    LedgerError: _Answer(status=503, type=_SERVER),
    SQLAlchemyError: _Answer(status=503, type=_SERVER),
    StoppingError: _Answer(status=503, type=_SERVER),
    WaitOverError: _Answer(status=504, type=_SERVER),
}


def envelope(
    status: int,
    message: str,
    *,
    kind: str = _INVALID,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The error envelope, and whether to try again: clients would also repeat a 409."""
    body = ErrorEnvelope(error=ErrorBody(message=message, type=kind, param=param, code=code))
    return Response(
        # ASCII: a message may quote a lone surrogate, which has no UTF-8.
        json.dumps(body.model_dump()).encode("ascii"),
        status_code=status,
        headers={**_advice(status), **(headers or {})},
        media_type="application/json",
    )


def _advice(status: int) -> Mapping[str, str]:
    if status == 503:
        return {"retry-after": "1"}
    # Who was not answered in time would only wait as long once more.
    is_permanent = (status < 500 and status != 408) or status == 504
    return no_retry() if is_permanent else {}


def no_retry() -> Mapping[str, str]:
    """Clients would also repeat what can only end in the same way."""
    return {"x-should-retry": "false"}


def internal_error() -> Response:
    """Tells nothing of the fault: that is in the log, under the answer's request id."""
    return envelope(500, "The server had an error processing your request.", kind=_SERVER)


def install_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    handlers: dict[Any, Callable[[Request, Any], Response]] = {
        RequestValidationError: _on_wrong_parameter,
        HTTPException: functools.partial(_on_http_exception, routes),
        ClientDisconnect: _on_disconnect,
        **dict.fromkeys(_ANSWERS, _on_refusal),
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _on_refusal(request: Request, error: Exception) -> Response:
    answer = next(_ANSWERS[kind] for kind in type(error).__mro__ if kind in _ANSWERS)
    if isinstance(error, RequestError):
        return envelope(
            answer.status,
            error.message,
            kind=answer.type,
            param=error.param,
            code=error.code,
            headers=_headers_of(error),
        )
    structlog.get_logger().error("ledger unusable", error=str(error))
    message = str(error) if isinstance(error, FreightError) else "The ledger cannot be used now."
    return envelope(answer.status, message, kind=answer.type)


def _headers_of(error: RequestError) -> Mapping[str, str]:
    match error:
        case RangeError():
            return {"content-range": f"bytes */{error.num_bytes}"}
        case UnauthorizedError():
            return {"www-authenticate": "Bearer"}
        case RateLimitError(retry_after_s=wait_s):
            # Told to wait for longer than that, clients would only fail later.
            passes = wait_s is not None and wait_s <= _MAX_RETRY_AFTER_S
            told_s = wait_s if passes else _MAX_RETRY_AFTER_S
            return {"retry-after": str(told_s), "x-should-retry": str(passes).lower()}
        case _:
            return {}


def _on_wrong_parameter(request: Request, error: RequestValidationError) -> Response:
    return _on_refusal(request, _refusal_of(error.errors()[0]))


def _refusal_of(fault: Mapping[str, Any]) -> InvalidRequestError:
    """A fault of the framework's own checks in the contract's words."""
    param, got, limits = str(fault["loc"][-1]), fault.get("input"), fault.get("ctx", {})
    match fault["type"]:
        case "missing":
            return values.missing(param)
        case "greater_than_equal":
            return values.below_minimum(param, limits["ge"], got)
        case "less_than_equal":
            return values.above_maximum(param, limits["le"], got)
        case "int_parsing" | "int_parsing_size" | "int_from_float" | "int_type":
            return values.wrong_type(param, "an integer", got)
        case "literal_error":
            supported = [part.strip("'") for part in limits["expected"].split(" or ")]
            return refusals.unsupported(str(got), param, supported)
        case _:
            message = f"Invalid value for '{param}'."
            return InvalidRequestError(message, param=param, code="invalid_value")


def _on_http_exception(
    routes: Sequence[BaseRoute], request: Request, error: HTTPException
) -> Response:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        allowed = ", ".join(sorted(_allowed_methods(routes, request)))
        message = f"Method not allowed ({where}). Allowed: {allowed}."
        return envelope(405, message, code="method_not_allowed", headers={"allow": allowed})
    if error.status_code == 404:
        return envelope(404, f"Invalid URL ({where})")
    kind = _INVALID if error.status_code < 500 else _SERVER
    return envelope(error.status_code, HTTPStatus(error.status_code).phrase, kind=kind)


def _allowed_methods(routes: Sequence[BaseRoute], request: Request) -> set[str]:
    # Each route knows only its own methods; several share a path.
    return {
        method
        for route in routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }


def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    # Nobody is there to read it; the log line has its status.
    return envelope(400, "The client went away before its request was complete.")
