"""Checklist 1 to 14: envelopes, statuses, ids, retries."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy.exc import OperationalError

from jobs.batch import BatchStatus
from jobs.settings import Settings
from server.app import create_app
from tests.support.server import Running, free_port, serving
from tests.support.wire import error_of

CREATE: dict[str, Any] = {"endpoint": "/v1/completions", "completion_window": "24h"}

REFUSED: list[tuple[str, str, int]] = [
    ("GET", "/v1/nowhere", 404),
    ("GET", "/v1/files/file-none", 404),
    ("GET", "/v1/files/file-none/content", 404),
    ("DELETE", "/v1/files/file-none", 404),
    ("GET", "/v1/files?limit=0", 400),
    ("POST", "/v1/files", 415),
    ("POST", "/v1/uploads", 400),
    ("POST", "/v1/uploads/upload_none/parts", 404),
    ("POST", "/v1/uploads/upload_none/complete", 400),
    ("POST", "/v1/uploads/upload_none/cancel", 404),
    ("POST", "/v1/batches", 400),
    ("POST", "/v1/chat/completions", 400),
    ("GET", "/v1/batches?after=batch_none", 400),
    ("GET", "/v1/batches/batch_none", 404),
    ("POST", "/v1/batches/batch_none/cancel", 404),
    ("GET", "/v1/models/none", 404),
    ("PUT", "/v1/models", 405),
]


@pytest.mark.parametrize(("method", "path", "status"), REFUSED)
def test_001_every_refusal_is_the_envelope(
    http: httpx2.Client, method: str, path: str, status: int
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    error_of(answer)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1]", b'{"a": NaN}', b"[" * 100_000])
@pytest.mark.parametrize("path", ["batches", "uploads", "uploads/upload_x/complete"])
def test_002_malformed_json_is_400(http: httpx2.Client, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = http.post(f"/v1/{path}", content=body, headers=headers)
    assert answer.status_code == 400
    error_of(answer)


def test_003_an_unknown_path_is_404(http: httpx2.Client) -> None:
    answer = http.get("/v1/nowhere")
    assert answer.status_code == 404
    assert error_of(answer)["message"] == "Invalid URL (GET /v1/nowhere)"


def test_004_a_wrong_method_is_405_and_allows(http: httpx2.Client) -> None:
    for method, path, allowed in (
        ("PUT", "/v1/files", "GET, POST"),
        ("GET", "/v1/uploads", "POST"),
        ("DELETE", "/v1/batches/batch_x", "GET"),
        ("GET", "/v1/completions", "POST"),
    ):
        answer = http.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert error_of(answer)["code"] == "method_not_allowed"


def test_005_an_unhandled_exception_is_500_without_its_text(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("jobs.ledger.ledger.ModelRecords.all", fail)
    answer = http.get("/v1/models")
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "server_error"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_006_every_answer_has_an_id_that_the_client_sees(
    client: OpenAI, http: httpx2.Client, file_id: str
) -> None:
    batch = client.batches.create(input_file_id=file_id, **CREATE)
    seen = [batch._request_id, client.batches.retrieve(batch.id)._request_id]
    seen += [http.get(path).headers["x-request-id"] for path in ("/healthz", "/x", "/v1/files")]
    raw = client.files.with_raw_response.list()
    assert raw.request_id == raw.headers["x-request-id"]
    assert len({*seen, raw.request_id}) == 6
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.headers["openai-version"] == "2020-10-01"


def test_008_a_conflict_is_asked_for_once(client: OpenAI, running: Running, file_id: str) -> None:
    batch = client.batches.create(input_file_id=file_id, **CREATE)
    assert running.ledger.batches.advance(batch.id, BatchStatus.FAILED)
    with pytest.raises(openai.ConflictError) as refusal:
        client.batches.cancel(batch.id)
    assert refusal.value.response.headers["x-should-retry"] == "false"
    assert refusal.value.request.headers["x-stainless-retry-count"] == "0"


def test_010_the_client_gets_over_a_ledger_that_is_away_for_a_moment(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fail_once(*_: object) -> list[object]:
        calls.append(1)
        if len(calls) == 1:
            raise OperationalError("select secret", {}, Exception("disk I/O error"))
        return []

    monkeypatch.setattr("jobs.ledger.ledger.ModelRecords.all", fail_once)
    assert client.models.list().data == []
    assert len(calls) == 2


def test_010_the_client_gets_over_a_restart(tmp_path: Path) -> None:
    settings, port = Settings(state_dir=tmp_path), free_port()

    def serve_later() -> None:
        time.sleep(0.3)
        with serving(create_app(settings), port=port):
            done.wait(30)

    done = threading.Event()
    thread = threading.Thread(target=serve_later)
    thread.start()
    try:
        url = f"http://127.0.0.1:{port}/v1"
        with OpenAI(base_url=url, api_key="any", max_retries=8) as client:
            assert client.models.list().data == []
    finally:
        done.set()
        thread.join()


def test_011_an_unknown_field_is_refused_by_name(http: httpx2.Client) -> None:
    answer = http.post("/v1/batches", json={**CREATE, "input_file_id": "f", "prio": 1})
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("unknown_parameter", "prio")
    assert error["message"] == "Unknown parameter: 'prio'."


def test_012_no_accept_header_is_406(http: httpx2.Client, file_id: str) -> None:
    for path in (f"/v1/files/{file_id}/content", "/v1/files", "/v1/models"):
        assert http.get(path, headers={"accept": "application/binary"}).status_code == 200


def test_013_a_trailing_slash_is_served(http: httpx2.Client, file_id: str) -> None:
    for path in ("files", f"files/{file_id}", f"files/{file_id}/content", "batches", "models"):
        assert http.get(f"/v1/{path}/").status_code == 200


def test_014_times_are_whole_numbers(http: httpx2.Client, file_id: str) -> None:
    batch = http.post("/v1/batches", json={**CREATE, "input_file_id": file_id}).json()
    wish = {"filename": "x", "purpose": "batch", "bytes": 1, "mime_type": "text/jsonl"}
    upload = http.post("/v1/uploads", json=wish).json()
    file = http.get(f"/v1/files/{file_id}").json()
    times = [
        value
        for found in (batch, upload, file)
        for key, value in found.items()
        if key.endswith("_at") and value is not None
    ]
    assert len(times) == 6
    assert {type(value) for value in times} == {int}


def test_a_body_of_another_kind_is_415(http: httpx2.Client) -> None:
    answer = http.post("/v1/batches", data={"input_file_id": "file-x"})
    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_content_type"
    assert http.post("/v1/files", json={}).status_code == 415


def test_what_is_no_http_gets_the_envelope_too(running: Running) -> None:
    answer = spoken(running.url, b"hello\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[str]:
    settings = Settings(state_dir=tmp_path, client_stall_s=0.4)
    with serving(create_app(settings), stall_s=settings.client_stall_s) as url:
        yield url


def test_a_client_that_never_ends_its_head_is_cut_off(impatient: str) -> None:
    assert spoken(impatient, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Slow: ") == b""


def test_a_client_whose_body_stalls_is_told_to_try_again(impatient: str) -> None:
    head = b"POST /v1/batches HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = spoken(impatient, head + b"Content-Length: 1000\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"x-should-retry" not in answer
    assert b"request_body_timeout" in answer


def test_a_client_that_takes_nothing_is_cut_off(impatient: str, tmp_path: Path) -> None:
    with OpenAI(base_url=f"{impatient}/v1", api_key="any") as client:
        file = client.files.create(file=bytes(30_000_000), purpose="fine-tune")
    head = f"GET /v1/files/{file.id}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    assert 0 < len(spoken(impatient, head, wait_s=1.5)) < 30_000_000


def spoken(url: str, data: bytes, *, wait_s: float = 0.0) -> bytes:
    """All that comes back until the other side ends it."""
    parts = urlsplit(url)
    heard = b""
    with socket.create_connection((str(parts.hostname), parts.port or 0), timeout=20) as connection:
        connection.sendall(data)
        time.sleep(wait_s)
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65_536):
                heard += more
    return heard
