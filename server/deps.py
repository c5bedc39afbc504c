"""What routes are handed: the open ledger, file store, bell and settings, as annotated aliases."""

import dataclasses
from typing import Annotated, Final

from fastapi import Depends, Request

from jobs.errors import TooLargeError
from jobs.ledger.ledger import Ledger
from jobs.settings import Settings
from jobs.stores.base import FileStore
from server import refusals
from server.bell import Bell

_MAX_JSON_BYTES: Final = 2**20
_JSON: Final = "application/json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Opened and closed by the application's lifespan."""

    settings: Settings
    ledger: Ledger
    files: FileStore
    bell: Bell


def _services(request: Request) -> Services:
    services: Services = request.state.services
    return services


_ServicesDep = Annotated[Services, Depends(_services)]


def _ledger(services: _ServicesDep) -> Ledger:
    return services.ledger


def _files(services: _ServicesDep) -> FileStore:
    return services.files


def _bell(services: _ServicesDep) -> Bell:
    return services.bell


def _settings(services: _ServicesDep) -> Settings:
    return services.settings


async def _json_body(request: Request) -> bytes:
    content_type = request.headers.get("content-type")
    kind = (content_type or _JSON).partition(";")[0].strip().lower()
    if kind != _JSON and not kind.endswith("+json"):
        raise refusals.unsupported_content_type(content_type, _JSON)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_JSON_BYTES:
            raise TooLargeError(
                f"The JSON body is too large. The limit is {_MAX_JSON_BYTES} bytes."
            )
    return bytes(body)


LedgerDep = Annotated[Ledger, Depends(_ledger)]
FilesDep = Annotated[FileStore, Depends(_files)]
BellDep = Annotated[Bell, Depends(_bell)]
SettingsDep = Annotated[Settings, Depends(_settings)]
JsonBodyDep = Annotated[bytes, Depends(_json_body)]
"""The raw body, so that what is wrong with it is said in the contract's words."""
