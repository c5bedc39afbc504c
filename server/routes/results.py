"""`/v1/batches/{batch_id}/results`: what a batch has come to so far, while it runs."""

from collections.abc import Iterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from starlette.responses import Response, StreamingResponse

from server.deps import LedgerDep

router = APIRouter(tags=["batches"])
_JSONL: Final = "application/jsonl"
_CHUNK_BYTES: Final = 64 * 1024
_CONTENT: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {_JSONL: {"schema": {"type": "string"}}}}
}


@router.get("/v1/batches/{batch_id}/results", response_class=Response, responses=_CONTENT)
def get_results(
    batch_id: str, ledger: LedgerDep, after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0
) -> Response:
    """Result lines in the input's order, without the first `after`, up to the first that is open."""
    batch = ledger.batches.get(batch_id)
    rows = ledger.lines.recorded(batch.id, first=after)
    return StreamingResponse(_joined(rows), media_type=_JSONL)


def _joined(rows: Iterator[str]) -> Iterator[bytes]:
    part = bytearray()
    for row in rows:
        part += f"{row}\n".encode()
        if len(part) >= _CHUNK_BYTES:
            yield bytes(part)
            part.clear()
    yield bytes(part)
