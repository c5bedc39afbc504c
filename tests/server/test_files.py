"""`/v1/files` through the official client, and what must hold on the disk behind it."""

import httpx2
import openai
import pytest
from openai import OpenAI

from tests.support.server import Running
from tests.support.wire import error_of

NO_SUCH = "No such File object: file-none"


def test_a_unicode_file_name_round_trips(client: OpenAI, http: httpx2.Client, lines: bytes) -> None:
    name = 'Größe "日本" 😀.jsonl'
    file = client.files.create(file=(name, lines), purpose="batch")
    assert client.files.retrieve(file.id).filename == name.replace('"', "%22")
    disposition = http.get(f"/v1/files/{file.id}/content").headers["content-disposition"]
    assert disposition.isascii()
    assert "%E6%97%A5%E6%9C%AC" in disposition


@pytest.mark.parametrize(
    ("seconds", "code"),
    [(3_599, "integer_below_min_value"), (2_592_001, "integer_above_max_value")],
)
def test_expiry_out_of_range_is_refused(
    client: OpenAI, running: Running, lines: bytes, seconds: int, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.files.create(
            file=lines, purpose="batch", expires_after={"anchor": "created_at", "seconds": seconds}
        )
    assert (refusal.value.param, refusal.value.code) == ("expires_after.seconds", code)
    assert running.blobs() == []


@pytest.mark.parametrize(
    "data",
    [b"", b"not json\n{}\n", b'{"a":\n', b"\xff\xfe{}\n", b"[" * 100_000],
    ids=["empty", "words", "cut", "utf-16", "deep"],
)
def test_a_batch_file_must_begin_as_jsonl(client: OpenAI, running: Running, data: bytes) -> None:
    with pytest.raises(openai.BadRequestError, match=r"Must be \.jsonl") as refusal:
        client.files.create(file=("x.jsonl", data), purpose="batch")
    assert (refusal.value.param, refusal.value.code) == (None, None)
    assert running.blobs() == []
    assert running.ledger.files.page(limit=1, after=None).items == []


@pytest.mark.parametrize(
    "data",
    [b"\xef\xbb\xbf{}\n", b"\r\n\n{}\r\n", b"{}", b"{}\nnot json\n", b"\n \n"],
    ids=["bom", "blank first", "no newline", "bad later line", "blank only"],
)
def test_what_validation_judges_is_accepted_and_kept_as_sent(client: OpenAI, data: bytes) -> None:
    file = client.files.create(file=("x.jsonl", data), purpose="batch")
    assert client.files.content(file.id).read() == data


def test_an_empty_file_of_another_purpose_is_fine(client: OpenAI) -> None:
    file = client.files.create(file=("x", b""), purpose="fine-tune")
    assert client.files.content(file.id).read() == b""


def test_the_batch_limit_is_exact_and_named(client: OpenAI, running: Running) -> None:
    full = b'{"a":"' + b"x" * (100_000 - 8) + b'"}'
    client.files.create(file=full, purpose="batch")
    with pytest.raises(openai.BadRequestError, match=r"too large.*100001 bytes.*100000 bytes"):
        client.files.create(file=full + b"\n", purpose="batch")
    assert len(running.blobs()) == 1
    assert client.files.create(file=full + b"\n", purpose="fine-tune").bytes == 100_001


def test_a_deleted_file_is_gone_everywhere(client: OpenAI, running: Running, lines: bytes) -> None:
    file = client.files.create(file=lines, purpose="batch")
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=f"No such File object: {file.id}") as gone:
            call(file.id)
        assert (gone.value.param, gone.value.code) == ("id", None)
    assert client.files.list().data == []
    assert running.blobs() == []


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ({"limit": "0"}, "limit", "integer_below_min_value"),
        ({"limit": "10001"}, "limit", "integer_above_max_value"),
        ({"limit": "many"}, "limit", "invalid_type"),
        ({"order": "up"}, "order", "invalid_value"),
        ({"after": "file-none"}, "after", None),
    ],
)
def test_wrong_list_parameters_are_refused(
    http: httpx2.Client, query: dict[str, str], param: str, code: str | None
) -> None:
    answer = http.get("/v1/files", params=query)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


def test_an_unsupported_order_lists_what_is_supported(http: httpx2.Client) -> None:
    error = error_of(http.get("/v1/files", params={"order": "up"}))
    assert error["message"] == "Invalid value: 'up'. Supported values are: 'asc' and 'desc'."


def test_private_purposes_are_not_downloadable(client: OpenAI) -> None:
    file = client.files.create(file=b"x", purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="files of purpose: user_data"):
        client.files.content(file.id)


def test_every_purpose_passes_strict_validation(client: OpenAI) -> None:
    for purpose in ("assistants", "batch", "fine-tune", "vision", "user_data", "evals"):
        client.files.create(file=b"{}", purpose=purpose)
    assert len(client.files.list().data) == 6


def test_content_says_what_it_is(client: OpenAI, http: httpx2.Client, lines: bytes) -> None:
    file = client.files.create(file=("in.jsonl", lines), purpose="batch")
    headers = http.get(
        f"/v1/files/{file.id}/content", headers={"accept": "application/binary"}
    ).headers
    assert headers["content-length"] == str(len(lines))
    assert headers["content-type"] == "application/jsonl"
    assert headers["accept-ranges"] == "bytes"
    assert 'filename="in.jsonl"' in headers["content-disposition"]
    assert headers["etag"]


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=10-", 10, 100),
        ("bytes=-7", 93, 100),
        ("bytes=-700", 0, 100),
        ("bytes=90-5000", 90, 100),
        ("bytes=99-99", 99, 100),
    ],
)
def test_a_range_is_that_part(
    client: OpenAI, http: httpx2.Client, asked: str, start: int, end: int
) -> None:
    data = bytes(range(100))
    file = client.files.create(file=data, purpose="fine-tune")
    answer = http.get(f"/v1/files/{file.id}/content", headers={"range": asked})
    assert (answer.status_code, answer.content) == (206, data[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/100"


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=-", "lines=1-2", "bytes=0-1,4-5"])
def test_a_range_that_makes_no_sense_is_ignored(
    client: OpenAI, http: httpx2.Client, asked: str
) -> None:
    file = client.files.create(file=b"0123456789", purpose="fine-tune")
    answer = http.get(f"/v1/files/{file.id}/content", headers={"range": asked})
    assert (answer.status_code, answer.content) == (200, b"0123456789")


def test_a_range_beyond_the_end_is_refused(client: OpenAI, http: httpx2.Client) -> None:
    file = client.files.create(file=b"0123456789", purpose="fine-tune")
    answer = http.get(f"/v1/files/{file.id}/content", headers={"range": "bytes=10-"})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */10"
    error_of(answer)


def test_a_range_of_another_version_gets_the_whole_file(
    client: OpenAI, http: httpx2.Client
) -> None:
    file = client.files.create(file=b"0123456789", purpose="fine-tune")
    url = f"/v1/files/{file.id}/content"
    etag = http.get(url).headers["etag"]
    for given, status in ((etag, 206), ('"other"', 200)):
        headers = {"range": "bytes=0-1", "if-range": given}
        assert http.get(url, headers=headers).status_code == status


@pytest.mark.parametrize(
    "file_id",
    ["../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "%2e%2e%2fledger.db", "file-%00", "file-none"],
)
@pytest.mark.parametrize("rest", ["", "/content"])
def test_hostile_ids_find_nothing(http: httpx2.Client, file_id: str, rest: str) -> None:
    answer = http.get(f"/v1/files/{file_id}{rest}")
    assert answer.status_code == 404
    error_of(answer)
