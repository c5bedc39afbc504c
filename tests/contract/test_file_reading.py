"""Checklist 31 to 47: files read, listed, deleted, expired."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from jobs.file import File, Purpose
from jobs.settings import Settings
from jobs.stores import STORES
from tests.support.box import completion_line
from tests.support.processes import peak_memory_bytes, server_process
from tests.support.server import Running
from tests.support.service import Service
from tests.support.wire import error_of


def test_031_retrieving_gives_what_creating_gave(client: OpenAI, lines: bytes) -> None:
    file = client.files.create(file=lines, purpose="batch")
    assert client.files.retrieve(file.id) == file


@pytest.mark.parametrize("rest", ["", "/content"])
def test_032_an_unknown_id_is_404(http: httpx2.Client, rest: str) -> None:
    for file_id in ("file-none", "..%2F..%2Fetc%2Fpasswd", "file-%00", "%ED%A0%80"):
        answer = http.get(f"/v1/files/{file_id}{rest}")
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (404, None)
    error = error_of(http.get(f"/v1/files/file-none{rest}"))
    assert (error["message"], error["param"]) == ("No such File object: file-none", "id")


def test_033_content_is_what_was_uploaded(client: OpenAI, lines: bytes) -> None:
    file = client.files.create(file=lines, purpose="batch")
    assert client.files.content(file.id).read() == lines


def test_034_a_download_that_breaks_raises_in_the_client(
    client: OpenAI, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = client.files.create(file=bytes(3_000_000), purpose="fine-tune")
    url = f"/v1/files/{file.id}/content"
    with http.stream("GET", url) as answer:
        assert answer.headers["content-length"] == "3000000"

    def broken(opened: contextlib.ExitStack, *_: object) -> Iterator[bytes]:
        with opened:
            yield bytes(1_000_000)
            raise OSError("the disk is gone")

    monkeypatch.setattr("server.download._chunks", broken)
    with pytest.raises(openai.APIConnectionError):
        client.with_options(max_retries=0).files.content(file.id)


def test_036_a_range_is_206_with_its_bytes(client: OpenAI, http: httpx2.Client) -> None:
    data = bytes(range(100))
    file = client.files.create(file=data, purpose="fine-tune")
    answer = http.get(f"/v1/files/{file.id}/content", headers={"range": "bytes=0-9"})
    assert (answer.status_code, answer.content) == (206, data[:10])
    assert answer.headers["content-range"] == "bytes 0-9/100"


def test_037_a_deleted_file_is_gone(client: OpenAI, running: Running, lines: bytes) -> None:
    file = client.files.create(file=lines, purpose="batch")
    deleted = client.files.delete(file.id)
    assert deleted.model_dump() == {"id": file.id, "object": "file", "deleted": True}
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)
    assert file.id not in running.blobs()


def test_038_a_deleted_input_does_not_disturb_its_batch(service: Service) -> None:
    batch = service.submit([completion_line(index) for index in range(5)])
    service.client.files.delete(batch.input_file_id)
    done = service.wait(batch.id)
    assert (done.status, len(service.rows(done.output_file_id))) == ("completed", 5)


def test_039_newest_first_unless_asked_otherwise(fresh_client: OpenAI, lines: bytes) -> None:
    made = [fresh_client.files.create(file=lines, purpose="batch").id for _ in range(3)]
    assert [file.id for file in fresh_client.files.list().data] == made[::-1]
    assert [file.id for file in fresh_client.files.list(order="asc").data] == made


def test_040_purpose_filters(fresh_client: OpenAI, lines: bytes) -> None:
    fresh_client.files.create(file=lines, purpose="batch")
    tuning = fresh_client.files.create(file=lines, purpose="fine-tune")
    assert [file.id for file in fresh_client.files.list(purpose="fine-tune").data] == [tuning.id]
    assert fresh_client.files.list(purpose="nonsense").data == []


def test_041_the_ends_of_the_limit(http: httpx2.Client) -> None:
    for limit, code in (
        ("1", None),
        ("10000", None),
        ("0", "integer_below_min_value"),
        ("10001", "integer_above_max_value"),
        ("many", "invalid_type"),
    ):
        answer = http.get("/v1/files", params={"limit": limit})
        if code is None:
            assert answer.status_code == 200
        else:
            error = error_of(answer)
            assert (answer.status_code, error["param"], error["code"]) == (400, "limit", code)


@pytest.fixture
def twenty_five(fresh: Running) -> list[str]:
    """Files of one second; ids in the order of their creation."""
    made = [f"file-{index:02}" for index in range(25)]
    for file_id in made:
        fresh.ledger.files.add(
            File(
                id=file_id,
                purpose=Purpose.VISION,
                filename="x",
                num_bytes=0,
                created_at=int(time.time()),
                expires_at=None,
            )
        )
    return made


def test_042_paging_gives_all_in_order(fresh_client: OpenAI, twenty_five: list[str]) -> None:
    assert [file.id for file in fresh_client.files.list(limit=10)] == twenty_five[::-1]


def test_042_paging_works_without_blocking_too(fresh: Running, twenty_five: list[str]) -> None:
    async def listed() -> list[str]:
        async with AsyncOpenAI(
            base_url=f"{fresh.url}/v1", api_key="any", _strict_response_validation=True
        ) as client:
            return [file.id async for file in client.files.list(limit=10)]

    assert asyncio.run(listed()) == twenty_five[::-1]


def test_043_files_of_one_second_neither_vanish_nor_repeat(
    fresh_client: OpenAI, twenty_five: list[str]
) -> None:
    for order, expected in (("asc", twenty_five), ("desc", twenty_five[::-1])):
        asked: Any = order
        assert [file.id for file in fresh_client.files.list(limit=1, order=asked)] == expected


def test_044_has_more_is_exact(fresh_client: OpenAI, twenty_five: list[str]) -> None:
    assert fresh_client.files.list(limit=24).has_more is True
    assert fresh_client.files.list(limit=25).has_more is False
    last = fresh_client.files.list(limit=5, after=twenty_five[5])
    assert ([file.id for file in last.data], last.has_more) == (twenty_five[4::-1], False)


def test_045_first_and_last_id_are_those_of_the_data(fresh: Running, lines: bytes) -> None:
    with httpx2.Client(base_url=fresh.url) as http:
        empty = http.get("/v1/files").json()
        assert empty == {
            "object": "list",
            "data": [],
            "first_id": None,
            "last_id": None,
            "has_more": False,
        }
        files = {"file": lines}
        for _ in range(2):
            http.post("/v1/files", files=files, data={"purpose": "batch"})
        page = http.get("/v1/files").json()
    assert [page["first_id"], page["last_id"]] == [file["id"] for file in page["data"]]


def test_046_an_unknown_cursor_is_never_page_one(client: OpenAI, http: httpx2.Client) -> None:
    for after in ("file-none", "", "😀", "x" * 1_000):
        answer = http.get("/v1/files", params={"after": after})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "after")


def test_046_the_place_of_a_deleted_file_is_kept(fresh_client: OpenAI, lines: bytes) -> None:
    made = [fresh_client.files.create(file=lines, purpose="batch").id for _ in range(3)]
    fresh_client.files.delete(made[1])
    assert [file.id for file in fresh_client.files.list(after=made[1]).data] == [made[0]]


def test_047_an_expired_file_is_gone_with_its_bytes(service: Service) -> None:
    box, client = service.box, service.client
    with box.store.write("file-old") as stream:
        stream.write(b"{}")
    now = int(time.time())
    box.ledger.files.add(
        File(
            id="file-old",
            purpose=Purpose.BATCH,
            filename="old",
            num_bytes=2,
            created_at=now - 2,
            expires_at=now - 1,
        )
    )
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call("file-old")
    assert "file-old" not in [file.id for file in client.files.list()]
    box.until(lambda: "file-old" not in box.store.names())


@pytest.mark.slow
def test_034_a_killed_server_raises_in_the_client(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    with (
        server_process(settings) as (process, url),
        OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        file = client.files.create(file=bytes(50_000_000), purpose="fine-tune")
        with client.files.with_streaming_response.content(file.id) as answer:
            pieces = answer.iter_bytes(1_000_000)
            next(pieces)
            process.kill()
            with pytest.raises(Exception, match=r"(?i)peer closed|incomplete|reset"):
                list(pieces)


@pytest.mark.slow
def test_035_memory_is_flat_while_a_gigabyte_goes(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    store = STORES["folder"].open(settings.files_dir)
    with server_process(settings) as (process, url):
        with OpenAI(base_url=f"{url}/v1", api_key="any") as client:
            file = client.files.create(file=b"x", purpose="fine-tune")
            assert client.files.content(file.id).read() == b"x"
            with store.write(file.id) as stream:
                stream.truncate(2**30)
            before = peak_memory_bytes(process.pid)
            with client.files.with_streaming_response.content(file.id) as answer:
                num_bytes = sum(len(piece) for piece in answer.iter_bytes(2**20))
        assert num_bytes == 2**30
        assert peak_memory_bytes(process.pid) - before < 16 * 2**20
