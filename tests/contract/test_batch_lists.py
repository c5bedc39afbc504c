"""Checklist 113 to 116: batches listed."""

import time
from collections.abc import Callable

import httpx2
import pytest
from openai import OpenAI

from jobs.batch import Batch, Endpoint
from tests.support.server import Running
from tests.support.wire import error_of


@pytest.fixture
def add(fresh: Running) -> Callable[[int], None]:
    def add(index: int) -> None:
        now = int(time.time())
        fresh.ledger.batches.add(
            Batch(
                id=f"batch_{index}",
                endpoint=Endpoint.COMPLETIONS,
                input_file_id="file-x",
                completion_window="24h",
                created_at=now,
                expires_at=now + 86_400,
            )
        )

    return add


def ids(*indices: int) -> list[str]:
    return [f"batch_{index}" for index in indices]


def test_113_twenty_newest_first_unless_asked_otherwise(
    fresh_client: OpenAI, fresh: Running, add: Callable[[int], None]
) -> None:
    for index in range(25):
        add(index)
    page = fresh_client.batches.list()
    assert [batch.id for batch in page.data] == ids(*range(24, 4, -1))
    assert page.has_more is True
    assert fresh_client.batches.list(limit=25).has_more is False
    assert len(fresh_client.batches.list(limit=1).data) == 1
    assert len(fresh_client.batches.list(limit=100).data) == 25
    with httpx2.Client(base_url=fresh.url) as http:
        for limit, code in (
            ("0", "integer_below_min_value"),
            ("101", "integer_above_max_value"),
            ("9" * 5_000, "invalid_type"),
        ):
            answer = http.get("/v1/batches", params={"limit": limit})
            error = error_of(answer)
            assert (answer.status_code, error["param"], error["code"]) == (400, "limit", code)
        answer = http.get("/v1/batches", params={"after": "batch_none"})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "after")


def test_114_forty_five_batches_in_three_requests(
    fresh: Running, add: Callable[[int], None]
) -> None:
    for index in range(45):
        add(index)
    asked: list[str] = []

    def note(request: httpx2.Request) -> None:
        asked.append(str(request.url))

    http = httpx2.Client(event_hooks={"request": [note]})
    with OpenAI(base_url=f"{fresh.url}/v1", api_key="any", http_client=http) as client:
        found = [batch.id for batch in client.batches.list(limit=20)]
    assert found == ids(*range(44, -1, -1))
    assert len(asked) == 3


def test_115_batches_made_while_paging_repeat_nothing(
    fresh_client: OpenAI, add: Callable[[int], None]
) -> None:
    for index in range(4):
        add(index)
    first = fresh_client.batches.list(limit=2)
    add(4)
    second = fresh_client.batches.list(limit=2, after=first.data[-1].id)
    assert [batch.id for batch in [*first.data, *second.data]] == ids(3, 2, 1, 0)


def test_116_listed_as_retrieved(fresh_client: OpenAI, add: Callable[[int], None]) -> None:
    for index in range(3):
        add(index)
    for batch in fresh_client.batches.list().data:
        assert batch == fresh_client.batches.retrieve(batch.id)
