"""Checklist 49 to 53: a file in parts."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy import update

from jobs.ledger.ledger import Ledger
from jobs.ledger.tables import uploads
from tests.support.box import completion_line
from tests.support.server import Running
from tests.support.service import Service
from tests.support.wire import error_of, form


def begin(client: OpenAI, num_bytes: int, **more: Any) -> openai.types.Upload:
    wish: dict[str, Any] = {"purpose": "batch", "mime_type": "text/jsonl", "filename": "a.jsonl"}
    return client.uploads.create(bytes=num_bytes, **wish | more)


def send(client: OpenAI, upload_id: str, *pieces: bytes) -> list[str]:
    return [client.uploads.parts.create(upload_id, data=piece).id for piece in pieces]


def test_049_parts_make_a_file_in_the_order_asked_for(client: OpenAI, running: Running) -> None:
    upload = begin(client, 12)
    assert (upload.status, upload.bytes, upload.filename) == ("pending", 12, "a.jsonl")
    assert (upload.object, upload.purpose, upload.file) == ("upload", "batch", None)
    assert upload.expires_at == upload.created_at + 3_600
    second = client.uploads.parts.create(upload.id, data=b'c"}\n\n')
    assert (second.object, second.upload_id) == ("upload.part", upload.id)
    (first,) = send(client, upload.id, b'{"a":"b')
    done = client.uploads.complete(upload.id, part_ids=[first, second.id])
    assert done.status == "completed"
    assert done.file is not None
    assert (done.file.bytes, done.file.purpose, done.file.object) == (12, "batch", "file")
    assert done.file.expires_at == done.file.created_at + 2_592_000
    assert client.files.retrieve(done.file.id) == done.file
    assert client.files.content(done.file.id).read() == b'{"a":"bc"}\n\n'
    assert not {first, second.id} & set(running.blobs())


def test_049_parts_may_come_at_once(client: OpenAI) -> None:
    pieces = [b'{"a":1}\n', *(bytes([65 + index]) * 1_000 for index in range(8))]
    upload = begin(client, sum(map(len, pieces)))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda piece: send(client, upload.id, piece)[0], pieces))
    done = client.uploads.complete(upload.id, part_ids=parts)
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"".join(pieces)


def test_049_completing_again_changes_nothing(client: OpenAI) -> None:
    upload = begin(client, 3)
    parts = send(client, upload.id, b"{}\n")
    done = client.uploads.complete(upload.id, part_ids=parts)
    assert client.uploads.complete(upload.id, part_ids=parts) == done


def test_050_a_chunked_upload_runs_as_a_batch(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{completion_line(index)}\n" for index in range(20)))
    upload = service.client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="batch", part_size=1_000
    )
    assert upload.file is not None
    assert upload.file.filename == "in.jsonl"
    batch = service.client.batches.create(
        input_file_id=upload.file.id, endpoint="/v1/completions", completion_window="24h"
    )
    assert len(service.rows(service.wait(batch.id).output_file_id)) == 20


def test_051_bytes_and_md5_must_agree(client: OpenAI) -> None:
    upload = begin(client, 6)
    parts = send(client, upload.id, b"{}\n", b"{}\n")
    with pytest.raises(openai.BadRequestError, match=r"3 bytes in all.*6 bytes") as refusal:
        client.uploads.complete(upload.id, part_ids=parts[:1])
    assert refusal.value.param == "part_ids"
    with pytest.raises(openai.BadRequestError, match="md5") as refusal:
        client.uploads.complete(upload.id, part_ids=parts, md5="0" * 32)
    assert refusal.value.param == "md5"
    right = hashlib.md5(b"{}\n{}\n", usedforsecurity=False).hexdigest()
    done = client.uploads.complete(upload.id, part_ids=parts, md5=right.upper())
    assert done.status == "completed"


def test_051_unknown_and_repeated_parts_are_refused(client: OpenAI) -> None:
    upload, other = begin(client, 6), begin(client, 3)
    mine, theirs = send(client, upload.id, b"{}\n"), send(client, other.id, b"{}\n")
    for part_ids in ([*mine, *mine], [*mine, *theirs], ["part_none"], []):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.uploads.complete(upload.id, part_ids=part_ids)
        assert refusal.value.param == "part_ids"


def test_051_a_batch_file_in_parts_is_judged_like_any(client: OpenAI) -> None:
    upload = begin(client, 6)
    parts = send(client, upload.id, b"words\n")
    with pytest.raises(openai.BadRequestError, match=r"Must be \.jsonl"):
        client.uploads.complete(upload.id, part_ids=parts)
    with pytest.raises(openai.BadRequestError, match=r"100001 bytes.*100000 bytes"):
        begin(client, 100_001)


def test_052_a_part_over_64_mib_is_refused(
    client: OpenAI, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.routes.uploads.MAX_PART_BYTES", 1_000)
    before = running.blobs()
    upload = begin(client, 5_000, purpose="fine-tune")
    send(client, upload.id, b"x" * 1_000)
    with pytest.raises(openai.APIStatusError, match="1000 bytes") as refusal:
        send(client, upload.id, b"x" * 1_001)
    assert refusal.value.status_code == 413
    client.uploads.cancel(upload.id)
    assert running.blobs() == before


def test_052_an_ended_upload_takes_no_parts(client: OpenAI, running: Running) -> None:
    before = len(running.blobs())
    done, gone = begin(client, 3), begin(client, 3)
    send(client, gone.id, b"{}\n")
    client.uploads.complete(done.id, part_ids=send(client, done.id, b"{}\n"))
    assert client.uploads.cancel(gone.id).status == "cancelled"
    assert client.uploads.cancel(gone.id).status == "cancelled"
    for upload, status in ((done, "completed"), (gone, "cancelled")):
        with pytest.raises(openai.BadRequestError, match=f"status '{status}'"):
            send(client, upload.id, b"{}\n")
    with pytest.raises(openai.BadRequestError, match=r"Cannot cancel .* 'completed'"):
        client.uploads.cancel(done.id)
    with pytest.raises(openai.BadRequestError, match=r"Cannot complete .* 'cancelled'"):
        client.uploads.complete(gone.id, part_ids=["part_x"])
    assert len(running.blobs()) == before + 1  # the file


def test_052_parts_cannot_fill_the_disk(client: OpenAI) -> None:
    upload = begin(client, 10)
    send(client, upload.id, b"x" * 10, b"x" * 10)
    with pytest.raises(openai.BadRequestError, match="more than twice"):
        send(client, upload.id, b"x")
    with pytest.raises(openai.BadRequestError, match="must hold data"):
        send(client, upload.id, b"")


def test_053_an_upload_expires_with_its_parts(service: Service) -> None:
    upload = begin(service.client, 6)
    (part,) = send(service.client, upload.id, b"{}\n")
    assert part in service.box.store.names()
    age(service.box.ledger, upload.id)
    for call in (
        lambda: send(service.client, upload.id, b"{}\n"),
        lambda: service.client.uploads.complete(upload.id, part_ids=[part]),
        lambda: service.client.uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.BadRequestError, match="status 'expired'"):
            call()
    service.box.until(lambda: part not in service.box.store.names())


def age(ledger: Ledger, upload_id: str) -> None:
    """As if its hour were over."""
    with ledger.uploads._database.writing() as connection:
        connection.execute(update(uploads).where(uploads.c.id == upload_id).values(expires_at=1))


RIGHT: dict[str, Any] = {"filename": "a", "purpose": "batch", "bytes": 1, "mime_type": "t"}


@pytest.mark.parametrize(
    ("changed", "param", "code"),
    [
        ({"bytes": 0}, "bytes", "integer_below_min_value"),
        ({"bytes": 8 * 2**30 + 1, "purpose": "vision"}, "bytes", "integer_above_max_value"),
        ({"bytes": "1"}, "bytes", "invalid_type"),
        ({"bytes": None}, "bytes", "missing_required_parameter"),
        ({"purpose": "evals"}, "purpose", "invalid_value"),
        ({"filename": 1}, "filename", "invalid_type"),
        ({"filename": ""}, "filename", "missing_required_parameter"),
        ({"filename": "a\x00"}, "filename", "invalid_value"),
        ({"filename": "\ud800"}, "filename", "invalid_value"),
        ({"filename": "x" * 256}, "filename", "string_above_max_length"),
        ({"mime_type": "x" * 256}, "mime_type", "string_above_max_length"),
        ({"mime": "x"}, "mime", "unknown_parameter"),
        ({"expires_after": {"anchor": "created_at"}}, "expires_after.seconds",
         "missing_required_parameter"),
    ],
)  # fmt: skip
def test_a_wrong_upload_is_refused_by_name(
    http: httpx2.Client, changed: dict[str, Any], param: str, code: str
) -> None:
    body = json.dumps(RIGHT | changed)
    answer = http.post("/v1/uploads", content=body, headers={"content-type": "application/json"})
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


def test_every_field_of_an_upload_is_required(http: httpx2.Client) -> None:
    for name in RIGHT:
        rest = {key: value for key, value in RIGHT.items() if key != name}
        error = error_of(http.post("/v1/uploads", json=rest))
        assert (error["param"], error["code"]) == (name, "missing_required_parameter")


def test_an_unknown_upload_is_404(http: httpx2.Client) -> None:
    for answer in (
        http.post("/v1/uploads/upload_none/parts", **form({"data": b"x"})),
        http.post("/v1/uploads/upload_none/complete", json={"part_ids": ["part_x"]}),
        http.post("/v1/uploads/%ED%A0%80/cancel"),
    ):
        assert answer.status_code == 404
        assert str(error_of(answer)["message"]).startswith("No such Upload object: ")


def test_a_part_needs_its_data(client: OpenAI, http: httpx2.Client) -> None:
    url = f"/v1/uploads/{begin(client, 3).id}/parts"
    for fields, code in (({"file": b"x"}, "unknown_parameter"), ({}, None)):
        answer = http.post(url, **form(fields))
        assert (answer.status_code, error_of(answer)["code"]) == (400, code)


def test_expiry_of_the_file_counts_from_its_creation(client: OpenAI) -> None:
    policy = {"anchor": "created_at", "seconds": 3_600}
    upload = begin(client, 3, expires_after=policy)
    done = client.uploads.complete(upload.id, part_ids=send(client, upload.id, b"{}\n"))
    assert done.file is not None
    assert done.file.expires_at == done.file.created_at + 3_600
