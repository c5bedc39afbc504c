"""Checklist 48: what is another tenant's is as if it had never been, on every route there is.

Driven by the table of routes: a route that is added and not told of here fails.
"""

import dataclasses
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import openai
import pytest
from openai.types import Batch

from jobs.batch import BatchStatus, Endpoint
from jobs.file import File, Purpose, new_file_id
from server.routes import OPEN_ROUTES, ROUTES
from tests.support.tenants import Tenants, operations
from tests.support.wire import error_of, form, request_lines

INPUT = request_lines(2)
CREATE: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
IDS = ("file_id", "batch_id", "upload_id")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Belongings:
    """One of each kind, by the names that routes have for them."""

    file_id: str
    result_file_id: str
    batch_id: str
    upload_id: str
    part_id: str

    def all(self) -> tuple[str, ...]:
        return dataclasses.astuple(self)


@pytest.fixture
def mine(tenants: Tenants) -> Belongings:
    client, ledger = tenants.mine, tenants.running.ledger
    file = client.files.create(file=INPUT, purpose="batch")
    batch = client.batches.create(input_file_id=file.id, **CREATE)
    upload = client.uploads.create(
        bytes=len(INPUT), purpose="batch", mime_type="text/jsonl", filename="f.jsonl"
    )
    part = client.uploads.parts.create(upload.id, data=INPUT)
    result = new_file_id()
    with tenants.running.files.write(result) as stream:
        stream.write(b"{}\n")
    ledger.files.add_once(
        File(
            id=result,
            purpose=Purpose.BATCH_OUTPUT,
            filename="result",
            num_bytes=3,
            created_at=int(time.time()),
            expires_at=None,
            tenant=ledger.batches.get(batch.id).tenant,  # as the finalize task adds it
        )
    )
    return Belongings(
        file_id=file.id,
        result_file_id=result,
        batch_id=batch.id,
        upload_id=upload.id,
        part_id=part.id,
    )


def unknown(found: Belongings) -> Belongings:
    """The same with ids that nobody ever had."""
    kinds = {name: text.partition("_" if "_" in text else "-") for name, text in _named(found)}
    return Belongings(
        **{name: f"{kind}{mark}{secrets.token_hex(12)}" for name, (kind, mark, _) in kinds.items()}
    )


def _named(found: Belongings) -> list[tuple[str, str]]:
    return [(field.name, getattr(found, field.name)) for field in dataclasses.fields(found)]


def body_for(path: str, found: Belongings) -> dict[str, Any]:
    """What the routes that have an id in their path and read a body need in it to succeed."""
    bodies: Mapping[str, dict[str, Any]] = {
        "/v1/uploads/{upload_id}/parts": form({"data": INPUT}),
        "/v1/uploads/{upload_id}/complete": {"json": {"part_ids": [found.part_id]}},
    }
    return bodies.get(path, {})


def ask(client: httpx2.Client, method: str, path: str, found: Belongings) -> httpx2.Response:
    filled = re.sub(r"{(\w+)}", lambda match: getattr(found, match[1]), path)
    return client.request(method, filled, **body_for(path, found))


def told(answer: httpx2.Response, found: Belongings) -> tuple[object, ...]:
    """All that a stranger learns, the ids that he asked with left out."""
    text = answer.text
    for name, text_id in _named(found):
        text = text.replace(text_id, name)
    varying = ("x-request-id", "openai-processing-ms", "date", "content-length")
    headers = {name: text for name, text in answer.headers.items() if name not in varying}
    return answer.status_code, text, sorted(headers.items())


def seen_by_owner(tenants: Tenants, found: Belongings) -> list[object]:
    paths = (f"/v1/files/{found.file_id}", f"/v1/batches/{found.batch_id}")
    parts = tenants.running.ledger.uploads.parts(found.upload_id)
    upload = tenants.running.ledger.uploads.get(found.upload_id)
    return [upload, parts, *(tenants.http_mine.get(path).json() for path in paths)]


def with_ids() -> list[tuple[str, str]]:
    return [
        (method, path)
        for method, path in operations((*ROUTES, *OPEN_ROUTES))
        if any(f"{{{name}}}" in path for name in IDS)
    ]


WITHOUT_IDS = {
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("POST", "/v1/uploads"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model_id:path}"),
    ("GET", "/healthz"),
    *(("POST", endpoint.value) for endpoint in Endpoint),
}
"""Asked one by one below, or what they answer is everybody's."""


def test_048_every_route_is_asked_in_this_file() -> None:
    routes = operations((*ROUTES, *OPEN_ROUTES))
    assert set(routes) == set(with_ids()) | WITHOUT_IDS
    assert len(with_ids()) >= 8


@pytest.mark.parametrize(("method", "path"), with_ids())
def test_048_anothers_id_is_an_unknown_id(
    tenants: Tenants, mine: Belongings, method: str, path: str
) -> None:
    nobodys, before = unknown(mine), seen_by_owner(tenants, mine)
    theirs = ask(tenants.http_theirs, method, path, mine)
    error_of(theirs)
    assert theirs.status_code == 404
    assert told(theirs, mine) == told(ask(tenants.http_theirs, method, path, nobodys), nobodys)
    # Nothing of it was done: the owner finds it all as it was, and may do it.
    assert seen_by_owner(tenants, mine) == before
    if path.endswith("/retry"):  # of a batch that has ended
        for status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
            assert tenants.running.ledger.batches.advance(mine.batch_id, status)
    assert ask(tenants.http_mine, method, path, mine).status_code == 200


@pytest.mark.parametrize("path", ["/v1/files/{}", "/v1/files/{}/content"])
def test_048_a_result_file_is_its_batchs_tenants(
    tenants: Tenants, mine: Belongings, path: str
) -> None:
    nobodys = unknown(mine)
    asked = path.format(mine.result_file_id)
    theirs = tenants.http_theirs.get(asked)
    assert theirs.status_code == 404
    assert told(theirs, mine) == told(
        tenants.http_theirs.get(path.format(nobodys.result_file_id)), nobodys
    )
    assert tenants.http_mine.get(asked).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"), sorted(ask for ask in WITHOUT_IDS if ask[0] == "GET" and "{" not in ask[1])
)
def test_048_no_list_has_anything_of_anothers(
    tenants: Tenants, mine: Belongings, method: str, path: str
) -> None:
    answer = tenants.http_theirs.request(method, path)
    assert answer.status_code == 200
    assert [found for found in mine.all() if found in answer.text] == []


def test_048_each_tenant_lists_its_own(tenants: Tenants, mine: Belongings) -> None:
    theirs = tenants.theirs.files.create(file=INPUT, purpose="batch").id
    assert theirs in [file.id for file in tenants.theirs.files.list()]
    assert theirs not in [file.id for file in tenants.mine.files.list(limit=1)]
    listed = [file.id for file in tenants.mine.files.list()]
    assert {mine.file_id, mine.result_file_id} <= set(listed)
    assert mine.batch_id in [batch.id for batch in tenants.mine.batches.list(limit=1)]


@pytest.mark.parametrize(("path", "name"), [("files", "file_id"), ("batches", "batch_id")])
def test_048_anothers_cursor_is_an_unknown_one(
    tenants: Tenants, mine: Belongings, path: str, name: str
) -> None:
    def after(found: Belongings) -> tuple[object, ...]:
        query = {"after": getattr(found, name)}
        return told(tenants.http_theirs.get(f"/v1/{path}", params=query), found)

    assert after(mine) == after(unknown(mine))
    assert after(mine)[0] == 400


def test_048_no_batch_is_made_of_anothers_file(tenants: Tenants, mine: Belongings) -> None:
    def create(found: Belongings) -> tuple[object, ...]:
        body = {"input_file_id": found.file_id, **CREATE}
        return told(tenants.http_theirs.post("/v1/batches", json=body), found)

    assert create(mine) == create(unknown(mine))
    assert create(mine)[0] == 400


def test_048_no_upload_takes_anothers_parts(tenants: Tenants, mine: Belongings) -> None:
    upload = tenants.theirs.uploads.create(
        bytes=len(INPUT), purpose="batch", mime_type="text/jsonl", filename="f.jsonl"
    )

    def complete(found: Belongings) -> tuple[object, ...]:
        body = {"part_ids": [found.part_id]}
        path = f"/v1/uploads/{upload.id}/complete"
        return told(tenants.http_theirs.post(path, json=body), found)

    assert complete(mine) == complete(unknown(mine))
    assert complete(mine)[0] == 400
    assert tenants.mine.uploads.complete(mine.upload_id, part_ids=[mine.part_id]).file is not None


def test_048_an_idempotency_key_is_each_tenants_own(tenants: Tenants) -> None:
    name: dict[str, Any] = {"extra_headers": {"Idempotency-Key": secrets.token_hex(8)}}
    made: list[Batch | None] = []
    for client in (tenants.mine, tenants.theirs, tenants.mine, tenants.theirs):
        file = client.files.create(file=INPUT, purpose="batch")
        metadata = {"whose": client.api_key[-4:]}
        try:
            made.append(
                client.batches.create(input_file_id=file.id, metadata=metadata, **CREATE, **name)
            )
        except openai.ConflictError:
            made.append(None)  # another wish of the same tenant under the same name
    assert [batch is not None for batch in made] == [True, True, False, False]
    first, second = made[:2]
    assert first is not None
    assert second is not None
    assert first.id != second.id


def test_048_the_official_client_is_told_not_found(tenants: Tenants, mine: Belongings) -> None:
    theirs = tenants.theirs
    attempts: list[Callable[[], object]] = [
        lambda: theirs.files.retrieve(mine.file_id),
        lambda: theirs.files.content(mine.file_id),
        lambda: theirs.files.delete(mine.file_id),
        lambda: theirs.batches.retrieve(mine.batch_id),
        lambda: theirs.batches.cancel(mine.batch_id),
        lambda: theirs.uploads.cancel(mine.upload_id),
        lambda: theirs.uploads.parts.create(mine.upload_id, data=b"x"),
        lambda: theirs.uploads.complete(mine.upload_id, part_ids=[mine.part_id]),
    ]
    for attempt in attempts:
        with pytest.raises(openai.NotFoundError):
            attempt()
    assert tenants.mine.files.content(mine.file_id).read() == INPUT
    assert tenants.mine.batches.retrieve(mine.batch_id).status == "validating"
    done = tenants.mine.uploads.complete(mine.upload_id, part_ids=[mine.part_id])
    assert done.file is not None


def test_048_the_keys_of_a_tenant_see_the_same(tenants: Tenants, mine: Belongings) -> None:
    with tenants.client(tenants.key("mine")) as another:
        assert another.files.retrieve(mine.file_id).id == mine.file_id
        assert another.batches.cancel(mine.batch_id).status == "cancelling"
