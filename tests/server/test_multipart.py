"""Multipart bodies that the official client would never send."""

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import RequestError
from server.file_form import FileForm
from tests.support.server import Running
from tests.support.wire import error_of

FORM = {"content-type": "multipart/form-data; boundary=B"}


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    suffix = "" if filename is None else f'; filename="{filename}"'
    head = f'--B\r\nContent-Disposition: form-data; name="{name}"{suffix}\r\n\r\n'
    return head.encode() + value + b"\r\n"


PURPOSE = part("purpose", b"batch")
FILE = part("file", b"{}\n", "in.jsonl")
END = b"--B--\r\n"


def refused(http: httpx2.Client, body: bytes, headers: dict[str, str] = FORM) -> dict[str, object]:
    answer = http.post("/v1/files", content=body, headers=headers)
    is_form = headers.get("content-type", "").startswith("multipart/form-data")
    assert answer.status_code == (400 if is_form else 415)
    assert answer.headers["x-should-retry"] == "false"
    return error_of(answer)


def test_a_batch_file_before_its_purpose_is_judged_all_the_same(
    http: httpx2.Client, running: Running
) -> None:
    long = part("file", b'"' + b"x" * 100_000 + b'"', "f")
    assert "100002 bytes" in str(refused(http, long + PURPOSE + END)["message"])
    assert refused(http, part("file", b"words", "f") + PURPOSE + END)["param"] is None
    assert running.blobs() == []


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (FILE + END, "purpose", "missing_required_parameter"),
        (PURPOSE + END, "file", "missing_required_parameter"),
        (END, "purpose", "missing_required_parameter"),
        (part("purpose", b"fun") + FILE + END, "purpose", "invalid_value"),
        (part("purpose", b"batch_output") + FILE + END, "purpose", "invalid_value"),
        (part("purpose", b"x" * 300) + FILE + END, "purpose", "string_above_max_length"),
        (PURPOSE + FILE + part("color", b"red") + END, "color", "unknown_parameter"),
        (PURPOSE + PURPOSE + FILE + END, "purpose", None),
        (PURPOSE + FILE + FILE + END, "file", None),
        (
            PURPOSE + FILE + part("expires_after[seconds]", b"3600") + END,
            "expires_after.anchor",
            "missing_required_parameter",
        ),
        (
            PURPOSE + FILE + part("expires_after[anchor]", b"created_at") + END,
            "expires_after.seconds",
            "missing_required_parameter",
        ),
        (
            PURPOSE + FILE + part("expires_after[anchor]", b"now") + END,
            "expires_after.anchor",
            "invalid_value",
        ),
        (
            PURPOSE
            + FILE
            + part("expires_after[anchor]", b"created_at")
            + part("expires_after[seconds]", b"soon")
            + END,
            "expires_after.seconds",
            "invalid_type",
        ),
    ],
)
def test_wrong_fields_are_refused_by_name(
    http: httpx2.Client, running: Running, body: bytes, param: str, code: str | None
) -> None:
    error = refused(http, body)
    assert (error["param"], error["code"]) == (param, code)
    assert running.blobs() == []


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (PURPOSE + FILE, FORM),
        (PURPOSE + FILE[:-8], FORM),
        (b"no boundary at all", FORM),
        (b"", FORM),
        (b'--B\r\nContent-Disposition: form-data; filename="x"\r\n\r\n{}\r\n--B--', FORM),
        (b"--B\r\n\r\n{}\r\n--B--\r\n", FORM),
        (b"--B\r\nBad Header\r\n\r\n{}\r\n--B--\r\n", FORM),
        (b"--B\r\nX: " + b"x" * 10_000 + b"\r\n\r\n{}\r\n--B--\r\n", FORM),
        (PURPOSE + FILE + END, {"content-type": "multipart/form-data"}),
        (PURPOSE + FILE + END, {"content-type": f"multipart/form-data; boundary={'B' * 300}"}),
        (b'{"purpose": "batch"}', {"content-type": "application/json"}),
        (b"purpose=batch", {}),
    ],
)
def test_malformed_bodies_are_refused_and_leave_nothing(
    http: httpx2.Client, running: Running, body: bytes, headers: dict[str, str]
) -> None:
    assert refused(http, body, headers)["type"] == "invalid_request_error"
    assert running.blobs() == []


def test_an_upload_over_the_hard_limit_is_cut_short(http: httpx2.Client, running: Running) -> None:
    def body() -> object:
        yield b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        chunk = bytes(2**20)
        for _ in range(513):
            yield chunk

    answer = http.post("/v1/files", content=body(), headers=FORM)  # type: ignore[arg-type]  # a generator of bytes
    assert answer.status_code == 413
    assert str(512 * 2**20) in str(error_of(answer)["message"])
    assert running.blobs() == []


@given(body=st.binary(max_size=400), cut=st.integers(1, 50))
def test_no_body_makes_the_parser_fail(body: bytes, cut: int) -> None:
    for whole in (body, PURPOSE + part("file", body, "f") + END, PURPOSE + b"--B\r\n" + body + END):
        parser = FileForm(FORM["content-type"], max_batch_bytes=100)
        try:
            for start in range(0, len(whole), cut):
                parser.feed(whole[start : start + cut])
            upload = parser.finish()
        except RequestError:
            continue
        assert len(parser.take()) == upload.num_bytes
