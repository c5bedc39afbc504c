"""A server that asks for keys, and clients of it that show different ones."""

from collections.abc import Iterable
from typing import Any

import httpx2
from fastapi import APIRouter
from fastapi.routing import APIRoute
from openai import OpenAI

from jobs.tenant import Limits
from tests.support.server import Running


def operations(routers: Iterable[APIRouter]) -> list[tuple[str, str]]:
    """Method and path of each of their routes, as the table of routes has them."""
    return [
        (method, route.path)
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods or ())
    ]


class Tenants:
    """`mine` and `theirs` are two tenants' official clients; their plain ones begin with `http_`."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.mine_key, self.theirs_key = self.key("mine"), self.key("theirs")
        self.mine, self.theirs = self.client(self.mine_key), self.client(self.theirs_key)
        self.http_mine, self.http_theirs = self.http(self.mine_key), self.http(self.theirs_key)

    def close(self) -> None:
        for client in (self.mine, self.theirs, self.http_mine, self.http_theirs):
            client.close()

    def key(self, tenant: str, **limits: int) -> str:
        """The secret of another key of the tenant."""
        return self.running.ledger.keys.create(
            name="a test's", tenant=tenant, limits=Limits(**limits)
        )[1]

    def client(self, secret: str, **more: Any) -> OpenAI:
        url = f"{self.running.url}/v1"
        return OpenAI(base_url=url, api_key=secret, _strict_response_validation=True, **more)

    def http(self, secret: str | None) -> httpx2.Client:
        """Shows no key at all for None."""
        headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
        return httpx2.Client(base_url=self.running.url, headers=headers)
