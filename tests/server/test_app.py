"""What holds for every route: ids, envelopes, methods, slashes; and models and health."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import pytest
from redis import Redis
from rq import Queue, SimpleWorker
from rq.utils import utcformat
from sqlalchemy.exc import OperationalError

from jobs.queue import BLOCK_QUEUE
from jobs.settings import Settings
from server.app import create_app
from tests.support.server import Running, serving
from tests.support.wire import error_of


@pytest.mark.parametrize("path", ["/", "/nowhere", "/v1", "/v1/batches/a/b/c", "/docs", "//"])
def test_an_unknown_path_is_404_in_the_envelope(http: httpx2.Client, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 404
    assert str(error_of(answer)["message"]).startswith("Invalid URL (GET /")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/files", "GET, POST"),
        ("PATCH", "/v1/files/file-x", "DELETE, GET"),
        ("POST", "/v1/files/file-x/content", "GET"),
        ("DELETE", "/v1/batches", "GET, POST"),
        ("GET", "/v1/batches/batch_x/cancel", "POST"),
        ("DELETE", "/v1/models/org/name", "GET"),
        ("HEAD", "/v1/models", "GET"),
    ],
)
def test_a_wrong_method_is_405_and_says_what_is_right(
    http: httpx2.Client, method: str, path: str, allowed: str
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    if method != "HEAD":
        assert error_of(answer)["code"] == "method_not_allowed"


def test_an_unusable_ledger_is_503(http: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OperationalError("select secret", {}, Exception("disk I/O error"))

    monkeypatch.setattr("jobs.ledger.ledger.ModelRecords.all", fail)
    for path in ("/healthz", "/v1/models"):
        answer = http.get(path)
        assert answer.status_code == 503
        assert error_of(answer)["type"] == "server_error"
        assert "secret" not in answer.text


def test_health_tells_who_is_there(http: httpx2.Client, running: Running) -> None:
    assert http.get("/healthz").json() == {
        "status": "ok",
        "ledger": "ok",
        "redis": "ok",
        "worker": "absent",
        "worker_heartbeat_age_s": None,
        "intake_heartbeat_age_s": None,
    }
    worker = beating_worker(running.redis)
    found = http.get("/healthz").json()
    assert found["worker"] == "alive"
    assert 0 <= found["worker_heartbeat_age_s"] < 15
    assert found["intake_heartbeat_age_s"] is None
    # The key of a dead worker outlives it: only the age of its heartbeat tells.
    old = utcformat(datetime.now(UTC) - timedelta(minutes=2))
    running.redis.hset(worker.key, "last_heartbeat", old)
    found = http.get("/healthz").json()
    assert found["worker"] == "silent"
    assert found["worker_heartbeat_age_s"] > 100


def beating_worker(redis: Redis) -> SimpleWorker:
    worker = SimpleWorker([Queue(BLOCK_QUEUE, connection=redis)], connection=redis)
    worker.register_birth()  # type: ignore[no-untyped-call]  # rq annotates only some of it
    return worker


@pytest.mark.parametrize(
    ("redis_url", "told"),
    [(None, "absent"), ("unix:///nowhere/socket", "unreachable")],
)
def test_health_is_ok_without_redis(tmp_path: Path, redis_url: str | None, told: str) -> None:
    settings = Settings(state_dir=tmp_path, redis_url=redis_url)
    with serving(create_app(settings)) as url, httpx2.Client(base_url=url) as http:
        answer = http.get("/healthz")
    assert answer.status_code == 200
    assert answer.json()["redis"] == told


def test_the_openapi_page_lists_the_routes_and_no_422(http: httpx2.Client) -> None:
    page = http.get("/openapi.json").json()
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in page["paths"].items()
        for method, operation in methods.items()
    }
    assert len(operations) == 22
    assert all("422" not in operation["responses"] for operation in operations.values())
    body = operations["POST /v1/batches"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["input_file_id", "endpoint", "completion_window"]
    form = operations["POST /v1/files"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file", "purpose"]
