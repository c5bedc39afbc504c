"""What routes are handed: ledger, file store, bell, waiting room, settings, as annotated aliases."""

import dataclasses
from typing import Annotated, Final

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from jobs.errors import TooLargeError
from jobs.ledger.ledger import Ledger
from jobs.settings import Settings
from jobs.stores.base import FileStore
from jobs.tenant import Caller
from server import auth, refusals
from server.bell import Bell
from server.waiting_room import WaitingRoom

_MAX_JSON_BYTES: Final = 2**20
_JSON: Final = "application/json"
_BEARER: Final = HTTPBearer(
    scheme_name="key",
    description="A key of `freight keys create`. As long as there is none, anything or nothing.",
    auto_error=False,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Opened and closed by the application's lifespan."""

    settings: Settings
    ledger: Ledger
    files: FileStore
    bell: Bell
    waiting_room: WaitingRoom


def _services(request: Request) -> Services:
    services: Services = request.state.services
    return services


_ServicesDep = Annotated[Services, Depends(_services)]


def asked_for_a_key(
    services: _ServicesDep,
    shown: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
) -> Caller:
    """Raises UnauthorizedError."""
    secret = None if shown is None else shown.credentials.strip()
    return auth.caller_of(secret, services.ledger.keys)


CallerDep = Annotated[Caller, Depends(asked_for_a_key)]


def _ledger(services: _ServicesDep, caller: CallerDep) -> Ledger:
    return services.ledger.seen_by(caller)


def _whole_ledger(services: _ServicesDep) -> Ledger:
    return services.ledger


def _files(services: _ServicesDep) -> FileStore:
    return services.files


def _bell(services: _ServicesDep) -> Bell:
    return services.bell


def _settings(services: _ServicesDep) -> Settings:
    return services.settings


def _waiting_room(services: _ServicesDep) -> WaitingRoom:
    return services.waiting_room


async def _json_body(request: Request) -> bytes:
    return await read_json_body(request, max_bytes=_MAX_JSON_BYTES)


async def read_json_body(request: Request, *, max_bytes: int) -> bytes:
    """Raises ContentTypeError and, while it still comes, TooLargeError."""
    content_type = request.headers.get("content-type")
    kind = (content_type or _JSON).partition(";")[0].strip().lower()
    if kind != _JSON and not kind.endswith("+json"):
        raise refusals.unsupported_content_type(content_type, _JSON)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise TooLargeError(f"The JSON body is too large. The limit is {max_bytes} bytes.")
    return bytes(body)


LedgerDep = Annotated[Ledger, Depends(_ledger)]
"""As the caller sees it: another tenant's files, uploads and batches are not in it."""
WholeLedgerDep = Annotated[Ledger, Depends(_whole_ledger)]
"""Everybody's, for routes that show nothing of anybody."""
FilesDep = Annotated[FileStore, Depends(_files)]
BellDep = Annotated[Bell, Depends(_bell)]
SettingsDep = Annotated[Settings, Depends(_settings)]
WaitingRoomDep = Annotated[WaitingRoom, Depends(_waiting_room)]
JsonBodyDep = Annotated[bytes, Depends(_json_body)]
"""The raw body, so that what is wrong with it is said in the contract's words."""
