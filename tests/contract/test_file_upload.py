"""Checklist 15 to 30: what `POST /v1/files` takes, and what it refuses."""

import hashlib
import io
import random
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from openai import OpenAI

from jobs.settings import Settings
from server.app import create_app
from tests.support.processes import peak_memory_bytes, server_process
from tests.support.server import Running, serving
from tests.support.wire import error_of, form

ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"


def test_015_an_upload_is_answered_with_the_file(
    client: OpenAI, tmp_path: Path, lines: bytes
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines)
    with path.open("rb") as stream:
        file = client.files.create(file=stream, purpose="batch")
    assert (file.object, file.purpose, file.status) == ("file", "batch", "processed")
    assert (file.bytes, file.filename) == (len(lines), "in.jsonl")
    assert set(file.model_dump()) == {
        *("id", "object", "bytes", "created_at", "expires_at", "filename", "purpose"),
        *("status", "status_details"),
    }


def test_016_bytes_are_kept_as_sent(client: OpenAI) -> None:
    data = random.Random(1).randbytes(9_000_001).replace(b"\n", b"\r\n--")
    file = client.files.create(file=("blob.bin", data), purpose="fine-tune")
    with client.files.with_streaming_response.content(file.id) as answer:
        digest = hashlib.sha256(b"".join(answer.iter_bytes()))
    assert digest.digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("kind", [bytes, io.BytesIO])
def test_017_bytes_without_a_name_are_judged_by_content(
    client: OpenAI, lines: bytes, kind: Any
) -> None:
    file = client.files.create(file=kind(lines), purpose="batch")
    assert file.filename == "upload"


def test_018_a_unicode_file_name_round_trips(client: OpenAI, lines: bytes) -> None:
    file = client.files.create(file=("Größe 日本 😀.jsonl", lines), purpose="batch")
    assert client.files.retrieve(file.id).filename == "Größe 日本 😀.jsonl"


def test_019_the_file_may_come_before_its_purpose(http: httpx2.Client, lines: bytes) -> None:
    for fields in (["file", "purpose"], ["purpose", "file"]):
        values = {"file": lines, "purpose": b"batch"}
        answer = http.post("/v1/files", **form({name: values[name] for name in fields}))
        assert answer.status_code == 200
        assert answer.json()["bytes"] == len(lines)


def test_020_expiry_counts_from_creation(client: OpenAI, lines: bytes) -> None:
    policy: Any = {"anchor": "created_at", "seconds": 7_200}
    file = client.files.create(file=lines, purpose="batch", expires_after=policy)
    assert file.expires_at == file.created_at + 7_200


@pytest.mark.parametrize(
    ("seconds", "code"),
    [
        (3_599, "integer_below_min_value"),
        (3_600, None),
        (2_592_000, None),
        (2_592_001, "integer_above_max_value"),
    ],
)
def test_021_the_ends_of_expiry(
    client: OpenAI, lines: bytes, seconds: int, code: str | None
) -> None:
    policy: Any = {"anchor": "created_at", "seconds": seconds}
    if code is None:
        client.files.create(file=lines, purpose="batch", expires_after=policy)
        return
    with pytest.raises(openai.BadRequestError) as refusal:
        client.files.create(file=lines, purpose="batch", expires_after=policy)
    assert (refusal.value.param, refusal.value.code) == ("expires_after.seconds", code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({ANCHOR: b"now", SECONDS: b"3600"}, "expires_after.anchor", "invalid_value"),
        ({SECONDS: b"3600"}, "expires_after.anchor", "missing_required_parameter"),
        ({ANCHOR: b"created_at"}, "expires_after.seconds", "missing_required_parameter"),
        ({ANCHOR: b"created_at", SECONDS: b"1h"}, "expires_after.seconds", "invalid_type"),
    ],
)
def test_022_half_a_policy_or_another_anchor_is_refused(
    http: httpx2.Client, fields: dict[str, bytes], param: str, code: str
) -> None:
    answer = http.post("/v1/files", **form({"purpose": b"batch", "file": b"{}", **fields}))
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


def test_023_batch_files_live_thirty_days(client: OpenAI, lines: bytes) -> None:
    file = client.files.create(file=lines, purpose="batch")
    assert file.expires_at == file.created_at + 2_592_000


@pytest.mark.parametrize("purpose", ["assistants", "fine-tune", "vision", "user_data", "evals"])
def test_024_other_files_live_until_deleted(client: OpenAI, purpose: Any) -> None:
    assert client.files.create(file=b"x", purpose=purpose).expires_at is None


def test_025_purpose_and_file_are_named_when_wrong_or_missing(
    http: httpx2.Client, lines: bytes
) -> None:
    for fields, param, code in (
        ({"purpose": b"fun", "file": lines}, "purpose", "invalid_value"),
        ({"purpose": b"batch_output", "file": lines}, "purpose", "invalid_value"),
        ({"file": lines}, "purpose", "missing_required_parameter"),
        ({"purpose": b"batch"}, "file", "missing_required_parameter"),
    ):
        answer = http.post("/v1/files", **form(fields))
        error = error_of(answer)
        assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


def test_026_an_empty_batch_file_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Invalid file format for Batch API"):
        client.files.create(file=("x.jsonl", b""), purpose="batch")


def test_027_the_first_line_must_be_json_and_only_that(client: OpenAI) -> None:
    words = r"Invalid file format for Batch API. Must be \.jsonl"
    for data in (b"words\n{}\n", b'{"a":\n', b"\xff\xfe{}\n", b"[" * 100_000):
        with pytest.raises(openai.BadRequestError, match=words) as refusal:
            client.files.create(file=("x.jsonl", data), purpose="batch")
        assert (refusal.value.param, refusal.value.code) == (None, None)
    for data in (b"{}\nwords\n", b"\xef\xbb\xbf{}\n", b"\n\n{}\n", b"{}"):
        file = client.files.create(file=("x.jsonl", data), purpose="batch")
        assert client.files.content(file.id).read() == data


def test_028_the_limit_is_exact_and_named(client: OpenAI) -> None:
    full = b'{"a":"' + b"x" * (100_000 - 8) + b'"}'
    assert client.files.create(file=full, purpose="batch").bytes == 100_000
    with pytest.raises(openai.BadRequestError, match=r"too large.*100001 bytes.*100000 bytes"):
        client.files.create(file=full + b"\n", purpose="batch")


def test_028_the_limit_is_209715200_bytes_by_default() -> None:
    assert Settings(state_dir=Path()).max_file_bytes == 209_715_200


def test_029_an_interrupted_upload_leaves_nothing(fresh: Running) -> None:
    parts = urlsplit(fresh.url)
    whole = form({"purpose": b"batch", "file": b"{}\n" * 1_000_000})
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {whole['headers']['content-type']}"
    with socket.create_connection((str(parts.hostname), parts.port or 0)) as connection:
        body = whole["content"][:-2_000]
        connection.sendall(f"{head}\r\nContent-Length: 9000000\r\n\r\n".encode() + body)
        await_blobs(fresh, num_blobs=1)
    await_blobs(fresh, num_blobs=0)
    assert fresh.ledger.files.page(limit=1, after=None).items == []


def await_blobs(running: Running, *, num_blobs: int) -> None:
    """What a connection that breaks sets off can be awaited only by looking."""
    end_s = time.monotonic() + 30
    while len(running.blobs()) != num_blobs:
        assert time.monotonic() < end_s, running.blobs()
        time.sleep(0.01)


def test_a_form_that_never_ends_is_cut_short(
    fresh: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.connection.Connection.linger_s", 0.2)

    def endless(piece: bytes) -> Any:
        yield b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n{}\r\n'
        while True:
            yield piece

    headers = {"content-type": "multipart/form-data; boundary=B"}
    with httpx2.Client(base_url=fresh.url) as http:
        for piece, status in (
            (b"--B--\r\n" + b"x" * 65_536, 413),
            (b"--B\r\n" + b"x: y\r\n" * 100, 400),
            (b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + b"x" * 300, 400),
        ):
            answer = http.post("/v1/files", content=endless(piece), headers=headers)
            assert answer.status_code == status
            error_of(answer)
    assert fresh.blobs() == []


@pytest.mark.slow
def test_028_two_hundred_mebibytes_and_a_byte(tmp_path: Path) -> None:
    first = b'{"a":1}\n'
    full = first + bytes(209_715_200 - len(first))
    with (
        serving(create_app(Settings(state_dir=tmp_path))) as url,
        OpenAI(base_url=f"{url}/v1", api_key="any") as client,
    ):
        assert client.files.create(file=full, purpose="batch").bytes == 209_715_200
        with pytest.raises(openai.BadRequestError, match=r"209715201 bytes.*209715200 bytes"):
            client.files.create(file=full + b"\n", purpose="batch")


@pytest.mark.slow
def test_030_memory_is_bounded_while_two_hundred_megabytes_come(tmp_path: Path) -> None:
    with server_process(Settings(state_dir=tmp_path)) as (process, url):
        with OpenAI(base_url=f"{url}/v1", api_key="any") as client:
            client.files.create(file=b"{}", purpose="batch")
            before = peak_memory_bytes(process.pid)
            client.files.create(file=b"{}\n" + bytes(200_000_000), purpose="batch")
        assert peak_memory_bytes(process.pid) - before < 32 * 2**20
