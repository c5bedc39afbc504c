"""The application: opens what the routes stand on, and puts the routes together."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI

from jobs.ledger.ledger import Ledger
from jobs.openai import ErrorEnvelope
from jobs.settings import Settings
from jobs.stores import STORES
from server.bell import Bell
from server.deps import Services, asked_for_a_key
from server.errors import install_handlers
from server.pace import Pace
from server.request_log import RequestLog
from server.routes import OPEN_ROUTES, ROUTES
from server.waiting_room import WaitingRoom


def create_app(settings: Settings) -> FastAPI:
    """The ledger, store and bell are opened when it starts and closed when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with contextlib.AsyncExitStack() as stack:
            ledger = stack.enter_context(contextlib.closing(Ledger.open(settings.ledger_url)))
            files = STORES["folder"].open(settings.files_dir)
            bell = stack.enter_context(contextlib.closing(Bell.open(settings.redis_url)))
            room = WaitingRoom(
                ledger,
                bell,
                wait_s=settings.rider_wait_s,
                max_riders=settings.max_riders,
                party_riders=settings.shard_lines,
            )
            services = Services(
                settings=settings,
                ledger=ledger,
                files=files,
                bell=bell,
                waiting_room=await stack.enter_async_context(room.opened()),
            )
            yield {"services": services}

    app = FastAPI(
        title="Freight",
        summary="An OpenAI-compatible batch-job server",
        version="0.1.0",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": ErrorEnvelope}, "5XX": {"model": ErrorEnvelope}},
    )
    for router in ROUTES:
        app.include_router(router, dependencies=[Depends(asked_for_a_key)])
    for router in OPEN_ROUTES:
        app.include_router(router)
    routers = (*ROUTES, *OPEN_ROUTES)
    install_handlers(app, [route for router in routers for route in router.routes])
    app.add_middleware(Pace, stall_s=settings.client_stall_s)
    app.add_middleware(RequestLog)
    return app
