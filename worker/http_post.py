"""One POST to an address that somebody else has named: looked at before it is connected to.

Knows HTTP and addresses; neither webhooks nor batches. It goes through no proxy, follows nothing
and reads no body.
"""

import asyncio
import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final

import h11

from jobs.networks import Networks
from jobs.webhook import check_url

_PORTS: Final[Mapping[str, int]] = {"http": 80, "https": 443}
_READ_BYTES: Final = 4_096


class AddressRefusedError(OSError):
    """A host has no address that may be called."""


async def post(
    url: str, *, headers: Mapping[str, str], body: bytes, networks: Networks, limit_s: float
) -> int:
    """The answer's status, within so many seconds in all, the lookup too.

    Raises OSError, TimeoutError among them, or h11.RemoteProtocolError for an answer that is none.
    """
    parts = check_url(url)
    assert parts.hostname is not None
    request = h11.Request(
        method="POST",
        target=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        headers=[
            ("Host", parts.netloc),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            *headers.items(),
        ],
    )
    async with asyncio.timeout(limit_s):
        port = parts.port or _PORTS[parts.scheme]
        link = await _connected(parts.hostname, port, networks)
        secure: dict[str, Any] = {}
        if parts.scheme == "https":
            secure = {"ssl": ssl.create_default_context(), "server_hostname": parts.hostname}
        reader, writer = await asyncio.open_connection(sock=link, **secure)
        try:
            return await _status(reader, writer, request, body)
        finally:
            writer.transport.abort()  # nobody waits for the rest of what is said


async def _connected(host: str, port: int, networks: Networks) -> socket.socket:
    """To an address, not to a name: a name may mean another one when it is asked again."""
    loop = asyncio.get_running_loop()
    failure: OSError = AddressRefusedError(f"{host} is at no address that may be called")
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, address in found:
        if not networks.allow(str(address[0])):
            continue
        link = socket.socket(family, kind, protocol)
        try:
            link.settimeout(0)
            await loop.sock_connect(link, address)
        except OSError as error:
            link.close()
            failure = error
        except BaseException:
            link.close()
            raise
        else:
            return link
    raise failure


async def _status(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: h11.Request, body: bytes
) -> int:
    connection = h11.Connection(h11.CLIENT)
    for event in (request, h11.Data(data=body), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    await writer.drain()
    while not isinstance(answer := connection.next_event(), h11.Response):
        if answer is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(answer, h11.ConnectionClosed):
            raise ConnectionError("closed without an answer")
    return answer.status_code
