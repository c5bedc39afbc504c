"""Checklist 7 and 9: who is answered at all, and how much they may ask for."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy import update

from jobs.ledger.tables import batches
from jobs.tenant import Limits, key_id_of
from server.routes import OPEN_ROUTES, ROUTES
from tests.support.server import Running
from tests.support.tenants import Tenants, operations
from tests.support.wire import error_of, form, request_lines

INPUT = request_lines(1)
CREATE: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}


@pytest.fixture(scope="module")
def keyless(tenants: Tenants) -> Iterator[httpx2.Client]:
    with tenants.http(None) as client:
        yield client


@pytest.mark.parametrize(("method", "path"), operations(ROUTES))
def test_007_no_route_answers_without_a_key(keyless: httpx2.Client, method: str, path: str) -> None:
    answer = keyless.request(method, path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = error_of(answer)
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", None, None)
    assert str(error["message"]).startswith(
        "You didn't provide an API key. You need to provide your API key in an Authorization "
        "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
    )


@pytest.mark.parametrize(("method", "path"), operations(OPEN_ROUTES))
def test_007_what_is_open_shows_nothing_of_anybody(
    keyless: httpx2.Client, tenants: Tenants, method: str, path: str
) -> None:
    file_id = tenants.mine.files.create(file=INPUT, purpose="batch").id
    answer = keyless.request(method, path)
    assert (answer.status_code, path) == (200, "/healthz")
    assert file_id not in answer.text


def wrong_keys(tenants: Tenants) -> list[str]:
    """Of no kind, of a stranger, with one letter changed, and one that is revoked."""
    good, revoked = tenants.mine_key, tenants.key("mine")
    key_id = key_id_of(revoked)
    assert key_id is not None
    tenants.running.ledger.keys.revoke(key_id)
    changed = good[:-1] + ("A" if good[-1] != "A" else "B")
    return ["any", "x" * 500, "sk-freight-0123456789abcdef-x", changed, revoked]


def test_007_a_wrong_key_is_invalid_api_key_and_is_not_told(tenants: Tenants) -> None:
    for secret in wrong_keys(tenants):
        with (
            tenants.client(secret) as client,
            pytest.raises(openai.AuthenticationError) as refusal,
        ):
            client.models.list()
        assert refusal.value.code == "invalid_api_key"
        assert refusal.value.type == "invalid_request_error"
        assert "Incorrect API key provided: " in str(refusal.value)
        assert secret not in str(refusal.value)
        assert refusal.value.request.headers["x-stainless-retry-count"] == "0"


@pytest.mark.parametrize("shown", ["Basic YTpi", "Bearer", "token", ""])
def test_007_what_is_no_bearer_key_is_a_missing_one(keyless: httpx2.Client, shown: str) -> None:
    error = error_of(keyless.get("/v1/files", headers={"authorization": shown}))
    assert str(error["message"]).startswith("You didn't provide an API key.")


def test_007_the_word_bearer_may_be_written_anyhow(
    keyless: httpx2.Client, tenants: Tenants
) -> None:
    for word in ("bearer", "BEARER"):
        headers = {"authorization": f"{word} {tenants.mine_key}"}
        assert keyless.get("/v1/models", headers=headers).status_code == 200


def test_007_keys_are_good_and_bad_at_once(fresh: Running, fresh_client: OpenAI) -> None:
    """From a server that asks for none to one whose last key is gone, without a restart."""
    before = fresh_client.files.create(file=INPUT, purpose="batch")
    key, secret = fresh.ledger.keys.create(name="k", tenant="default", limits=Limits())
    with pytest.raises(openai.AuthenticationError):
        fresh_client.models.list()
    with OpenAI(base_url=f"{fresh.url}/v1", api_key=secret) as client:
        assert client.files.retrieve(before.id) == before  # of before there were keys
        fresh.ledger.keys.revoke(key.id)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    with pytest.raises(openai.AuthenticationError):  # and not open to all again
        fresh_client.models.list()


def test_007_the_key_is_asked_for_before_anything_is_said_of_the_request(
    keyless: httpx2.Client,
) -> None:
    json_type = {"content-type": "application/json"}
    answers = (
        keyless.get("/v1/files?limit=0"),
        keyless.post("/v1/batches", content=b"{", headers=json_type),
        keyless.post("/v1/files", **form({"purpose": b"nonsense"})),
    )
    assert [answer.status_code for answer in answers] == [401, 401, 401]


def limited(tenants: Tenants, tenant: str, **limits: int) -> OpenAI:
    return tenants.client(tenants.key(tenant, **limits), max_retries=0)


def age_batches(tenants: Tenants, tenant: str, *, by_s: int) -> None:
    with tenants.running.ledger._database.writing() as connection:
        connection.execute(
            update(batches)
            .where(batches.c.tenant == tenant)
            .values(created_at=batches.c.created_at - by_s)
        )


def test_009_batches_per_hour(tenants: Tenants) -> None:
    with limited(tenants, "hourly", batches_per_hour=2) as client:
        file_id = client.files.create(file=INPUT, purpose="batch").id
        made = [client.batches.create(input_file_id=file_id, **CREATE) for _ in range(2)]
        blobs = tenants.running.blobs()
        with pytest.raises(openai.RateLimitError, match="the limit is 2 per hour") as refusal:
            client.batches.create(input_file_id=file_id, **CREATE)
        headers = refusal.value.response.headers
        # An hour is more than any client waits: it is told not to.
        assert (headers["retry-after"], headers["x-should-retry"]) == ("120", "false")
        assert (refusal.value.code, refusal.value.type) == ("rate_limit_exceeded", "requests")
        age_batches(tenants, "hourly", by_s=3_550)
        with pytest.raises(openai.RateLimitError) as refusal:
            client.batches.create(input_file_id=file_id, **CREATE)
        headers = refusal.value.response.headers
        assert 1 <= int(headers["retry-after"]) <= 50
        assert headers["x-should-retry"] == "true"
        assert {batch.id for batch in client.batches.list()} == {batch.id for batch in made}
        assert tenants.running.blobs() == blobs
        age_batches(tenants, "hourly", by_s=100)
        client.batches.create(input_file_id=file_id, **CREATE)


def test_009_a_limit_is_the_tenants_whichever_key_asks(tenants: Tenants) -> None:
    with (
        limited(tenants, "shared", batches_per_hour=1) as one,
        limited(tenants, "shared", batches_per_hour=1) as other,
        limited(tenants, "shared") as unlimited,
        limited(tenants, "apart", batches_per_hour=1) as apart,
    ):
        file_id = one.files.create(file=INPUT, purpose="batch").id
        one.batches.create(input_file_id=file_id, **CREATE)
        with pytest.raises(openai.RateLimitError):
            other.batches.create(input_file_id=file_id, **CREATE)
        unlimited.batches.create(input_file_id=file_id, **CREATE)
        its_own = apart.files.create(file=INPUT, purpose="batch").id
        apart.batches.create(input_file_id=its_own, **CREATE)


def test_009_asking_again_for_the_same_batch_counts_once(tenants: Tenants) -> None:
    with limited(tenants, "again", batches_per_hour=1) as client:
        file_id = client.files.create(file=INPUT, purpose="batch").id
        again: dict[str, Any] = {"extra_headers": {"Idempotency-Key": "one"}}
        first = client.batches.create(input_file_id=file_id, **CREATE, **again)
        assert client.batches.create(input_file_id=file_id, **CREATE, **again) == first


def test_009_of_many_at_once_as_many_as_allowed_are_made(tenants: Tenants) -> None:
    with limited(tenants, "racing", batches_per_hour=3) as client:
        file_id = client.files.create(file=INPUT, purpose="batch").id

        def create(_: int) -> bool:
            try:
                client.batches.create(input_file_id=file_id, **CREATE)
            except openai.RateLimitError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(create, range(8))) == 3


def test_009_stored_bytes_of_files(tenants: Tenants) -> None:
    limit = 2 * len(INPUT) + 1
    with limited(tenants, "storing", stored_bytes=limit) as client:
        made = [client.files.create(file=INPUT, purpose="batch") for _ in range(2)]
        blobs = tenants.running.blobs()
        with pytest.raises(openai.RateLimitError, match=f"the limit is {limit} bytes") as refusal:
            client.files.create(file=INPUT, purpose="batch")
        assert (refusal.value.code, refusal.value.type) == ("insufficient_quota",) * 2
        assert 0 < int(refusal.value.response.headers["retry-after"]) <= 120
        assert refusal.value.response.headers["x-should-retry"] == "false"
        assert tenants.running.blobs() == blobs
        client.files.delete(made[0].id)
        client.files.create(file=INPUT, purpose="batch")


def test_009_stored_bytes_of_parts(tenants: Tenants) -> None:
    with limited(tenants, "parts", stored_bytes=20) as client:

        def begin(num_bytes: int) -> str:
            return client.uploads.create(
                bytes=num_bytes, purpose="batch", mime_type="t", filename="f"
            ).id

        with pytest.raises(openai.RateLimitError):
            begin(21)
        first, second = begin(12), begin(12)
        part = client.uploads.parts.create(first, data=b'{"a":"bcde"}')
        with pytest.raises(openai.RateLimitError):
            client.uploads.parts.create(second, data=b'{"a":"bcde"}')
        done = client.uploads.complete(first, part_ids=[part.id])
        assert done.file is not None
        with pytest.raises(openai.RateLimitError):
            client.uploads.parts.create(second, data=b"123456789")
        small = client.uploads.parts.create(second, data=b"12345678")
        assert small.upload_id == second
        client.uploads.cancel(second)
        client.files.create(file=b'{"a":1}\n', purpose="batch")  # 8 bytes: 20 in all


def test_009_a_full_store_is_said_before_the_file_is_sent(tenants: Tenants) -> None:
    with limited(tenants, "full", stored_bytes=len(INPUT)) as client:
        client.files.create(file=INPUT, purpose="batch")
        with tenants.http(client.api_key) as http:
            # Not even a form: nothing of the body was looked at.
            answer = http.post("/v1/files", content=b"x")
            assert (answer.status_code, error_of(answer)["code"]) == (429, "insufficient_quota")
