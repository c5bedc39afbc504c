"""The endpoints of batches, asked by themselves: each request joins the block, and its client waits."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from jobs.batch import Endpoint
from jobs.ledger.ledger import Ledger
from jobs.rider import RiderAnswer
from jobs.settings import Settings
from jobs.streams import stream_text
from server.deps import LedgerDep, SettingsDep, WaitingRoomDep, read_json_body
from server.errors import no_retry
from server.rider_request import (
    AnswerForm,
    RiderRequest,
    answers_of,
    parse_rider_request,
    request_schema,
)
from server.waiting_room import WaitingRoom

router = APIRouter(tags=["riders"])


def _add_route(endpoint: Endpoint) -> None:
    content = {"application/json": {"schema": request_schema(endpoint)}}
    answers = answers_of(endpoint)
    body = {"requestBody": {"required": True, "content": content}}

    @router.post(endpoint.value, response_class=Response, responses=answers, openapi_extra=body)
    async def ask(
        request: Request, ledger: LedgerDep, settings: SettingsDep, room: WaitingRoomDep
    ) -> Response:
        """Answered as a line of a batch is, beside those; within the time that a rider waits."""
        with room.place():
            rider_id, form = await _board(
                request, endpoint, ledger=ledger, settings=settings, room=room
            )
            try:
                answer = await _unless_gone(request, room.answer_to(rider_id))
            finally:
                room.leave(rider_id)
        return _response(answer, form, endpoint)


for _endpoint in Endpoint:
    _add_route(_endpoint)


async def _board(
    request: Request, endpoint: Endpoint, *, ledger: Ledger, settings: Settings, room: WaitingRoom
) -> tuple[str, AnswerForm]:
    """The rider's id. Nothing keeps the body, which may be large, while its answer is waited for."""
    raw = await read_json_body(request, max_bytes=settings.max_line_bytes)
    asked = await run_in_threadpool(_parse, raw, endpoint, ledger)
    return room.board(endpoint, asked.model, asked.body), asked.form


def _parse(raw: bytes, endpoint: Endpoint, ledger: Ledger) -> RiderRequest:
    """Raises InvalidRequestError, or NotFoundError for a model that is not served."""
    asked = parse_rider_request(raw, endpoint)
    ledger.models.get(asked.model)
    return asked


async def _unless_gone(request: Request, waiting: Coroutine[Any, Any, RiderAnswer]) -> RiderAnswer:
    """Raises ClientDisconnect when the client goes away before."""
    answer, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _response(answer: RiderAnswer, form: AnswerForm, endpoint: Endpoint) -> Response:
    if answer.status_code != 200 or not form.is_streamed:
        return Response(
            answer.body,
            status_code=answer.status_code,
            headers=None if answer.status_code == 200 else no_retry(),
            media_type="application/json",
        )
    return Response(
        stream_text(json.loads(answer.body), endpoint, with_usage=form.with_usage),
        headers={"cache-control": "no-cache"},
        media_type="text/event-stream",
    )
