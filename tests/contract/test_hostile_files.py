"""Files, forms and names that mean harm: judged in bounded memory, and kept where they belong."""

import codecs
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.batch import Endpoint
from jobs.line import parse_request_line
from tests.support.box import completion_line
from tests.support.server import Running
from tests.support.service import Service, faults_of
from tests.support.wire import error_of, form
from worker.input_lines import input_lines
from worker.inspection import MAX_FAULTS, Inspection

MAX_LINE_BYTES = 200
MAX_LINES = 6
MIB = 2**20

right_lines = st.integers(0, 9).map(lambda index: completion_line(index).encode())
pieces = st.sampled_from(
    [
        b"",
        b" \t",
        b"\r",
        b"{}",
        b"[1]",
        b'"',
        b"\xff\xfe",
        b"\xed\xa0\x80",
        codecs.BOM_UTF8,
        b"\x00",
        b"\xe2\x80\xa8",
        b"[" * 90,
        b'{"a":' * 30,
        b"-1e999",
        b"9" * 150,
        b"x" * MAX_LINE_BYTES,
        b"x" * (MAX_LINE_BYTES + 1),
        b"x" * MAX_LINE_BYTES + b"\r",
    ]
)
files = st.tuples(
    st.sampled_from([b"", codecs.BOM_UTF8]),
    st.lists(right_lines | pieces | st.binary(max_size=30), max_size=12),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
).map(lambda parts: parts[0] + parts[2].join(parts[1]) + (parts[2] if parts[3] else b""))


def inspection() -> Inspection:
    return Inspection(
        endpoint=Endpoint.COMPLETIONS,
        served_model="tiny",
        max_lines=MAX_LINES,
        max_line_bytes=MAX_LINE_BYTES,
    )


@settings(max_examples=400)
@given(files)
def test_any_file_is_judged_line_by_line(raw: bytes) -> None:
    """Against the file split in one go: which lines there are, where, and what is said of them."""
    offset = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    expected = []
    for number, piece in enumerate(raw[offset:].split(b"\n"), start=1):
        if piece.strip():
            expected.append((number, offset))
        offset += len(piece) + 1
    found = list(input_lines(io.BytesIO(raw), max_line_bytes=MAX_LINE_BYTES))
    assert [(line.number, line.offset_bytes) for line in found] == expected
    for line in found:
        if line.raw is not None:
            assert raw[line.offset_bytes :].startswith(line.raw)
            assert len(line.raw) <= MAX_LINE_BYTES
    faults = inspection().look(found)
    assert len(faults) <= MAX_FAULTS + 2
    assert all(
        fault.line is None or fault.line in {line.number for line in found} for fault in faults
    )
    if not faults:  # then nothing is found later, when it is too late to refuse the file
        custom_ids = set()
        for line in found:
            assert line.raw is not None
            request, _ = parse_request_line(
                line.raw, line=line.number, endpoint=Endpoint.COMPLETIONS
            )
            assert request is not None
            custom_ids.add(request.custom_id)
        assert 0 < len(custom_ids) == len(found) <= MAX_LINES


REPEATED: dict[str, tuple[bytes, str]] = {
    "blank lines": (b"\n", "empty_file"),
    "blanks without an end": (b" ", "line_too_long"),
    "empty objects": (b"{}\n", "request_limit_exceeded"),
    "one right line": (completion_line(0).encode() + b"\n", "request_limit_exceeded"),
    "one line without an end": (b"x", "line_too_long"),
    "broken UTF-8": (b"\xff\n", "request_limit_exceeded"),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_repetition_is_judged_in_bounded_memory(kind: str) -> None:
    piece, code = REPEATED[kind]
    raw = io.BytesIO(piece * (MIB // 4 // len(piece)))
    with at_most(MIB // 5):  # skipping what is too long holds 64 KiB, twice
        faults = inspection().look(input_lines(raw, max_line_bytes=MAX_LINE_BYTES))
    assert faults[-1].code == code


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Of memory of this process, above what there was."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before <= num_bytes


JSON = {"content-type": "application/json"}
BODIES: dict[str, bytes] = {
    "deep": b'{"metadata": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "half deep": b'{"metadata": ' + b"[" * 500_000,
    "a number of half a megabyte": b'{"bytes": ' + b"9" * 500_000 + b"}",
    "a number beyond floats": b'{"bytes": 1e999999}',
    "a number of its own": b'{"bytes": -Infinity}',
    "invalid UTF-8": b'{"filename": "' + b"\xc0\x80" * 1_000 + b'"}',
    "half of a pair": b'{"filename": "\\ud800", "purpose": "\\udfff"}',
    "many keys": json.dumps(dict.fromkeys(map(str, range(50_000)), 1)).encode(),
    "a compressed bomb": gzip.compress(bytes(100 * MIB)),
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("path", ["/v1/batches", "/v1/uploads", "/v1/uploads/upload_x/complete"])
def test_a_hostile_body_is_a_refusal(http: httpx2.Client, path: str, kind: str) -> None:
    encoding = {"content-encoding": "gzip"} if kind == "a compressed bomb" else {}
    answer = http.post(path, content=BODIES[kind], headers={**JSON, **encoding})
    assert answer.status_code == 400
    assert len(str(error_of(answer)["message"])) < 1_000


def test_a_compressed_file_is_no_batch_file_and_is_not_unpacked(
    http: httpx2.Client, running: Running
) -> None:
    bomb = gzip.compress(bytes(100 * MIB))
    before = running.blobs()
    answer = http.post("/v1/files", **form({"purpose": b"batch", "file": bomb[:90_000]}))
    assert answer.status_code == 400
    sent = form({"purpose": b"batch", "file": b"{}\n"})
    sent["headers"] |= {"content-encoding": "gzip"}
    sent["content"] = gzip.compress(sent["content"])
    assert http.post("/v1/files", **sent).status_code == 400
    assert running.blobs() == before


def endless(opening: bytes, piece: bytes) -> Iterator[bytes]:
    yield opening
    while True:
        yield piece


FORM = {"content-type": "multipart/form-data; boundary=B"}
FILE = b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n{}\r\n'
ENDLESS: dict[str, tuple[str, dict[str, str], Callable[[], Iterator[bytes]], int]] = {
    "JSON": ("/v1/batches", JSON, lambda: endless(b"[", b"[" * 65_536), 413),
    "spaces of JSON": ("/v1/uploads", JSON, lambda: endless(b"", b" " * 65_536), 413),
    "a preamble": ("/v1/files", FORM, lambda: endless(b"", b"\r\n" * 32_768), 413),
    "an epilogue": ("/v1/files", FORM, lambda: endless(FILE + b"--B--\r\n", b"x" * 65_536), 413),
    "a header": ("/v1/files", FORM, lambda: endless(b"--B\r\nA: ", b"x" * 65_536), 400),
    "parts": ("/v1/files", FORM, lambda: endless(FILE, FILE), 400),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_never_ends_is_cut_short_in_bounded_memory(
    running: Running, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("server.connection.Connection.linger_s", 0.2)
    path, headers, body, status = ENDLESS[kind]
    before = running.blobs()
    with at_most(16 * MIB), httpx2.Client(base_url=running.url) as http:
        answer = http.post(path, content=body(), headers=headers)
    assert answer.status_code == status
    error_of(answer)
    assert running.blobs() == before


NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\boot.ini",
    "a/b/../../../c",
    "....//....//x",
    "%2e%2e%2fx",
    "~/.ssh/id_rsa",
    "CON",
    "a; rm -rf .jsonl",
    "\"; filename*=UTF-8''x",
    "\u202egnp.exe",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_files_name_leads_nowhere(http: httpx2.Client, running: Running, name: str) -> None:
    """Kept as a word and given back as one; the bytes lie under an id of ours."""
    beside = sorted(running.state_dir.parent.iterdir())
    inside, blobs = set(running.state_dir.rglob("*")), set(running.blobs())
    file = http.post("/v1/files", files={"file": (name, b"{}\n")}, data={"purpose": "batch"}).json()
    assert set(running.blobs()) - blobs == {file["id"]}
    found = {path.name for path in set(running.state_dir.rglob("*")) - inside}
    assert found <= {file["id"], "ledger.db-wal", "ledger.db-shm"}
    assert sorted(running.state_dir.parent.iterdir()) == beside
    head = http.get(f"/v1/files/{file['id']}/content").headers["content-disposition"]
    assert head.startswith('attachment; filename="')
    assert "\n" not in head
    plain, _, quoted = head.rpartition("; filename*=UTF-8''")
    assert plain.count('"') == 2
    assert "/" not in quoted
    upload = {"filename": name, "purpose": "batch", "bytes": 3, "mime_type": "../../x"}
    assert http.post("/v1/uploads", json=upload).json()["filename"] == name


IDS = (
    "..",
    "../ledger.db",
    "../../../etc/passwd",
    "files/../ledger.db",
    "file-\x00",
    "*",
    "a" * 129,
)
ASKS: dict[str, Callable[[httpx2.Client, str], httpx2.Response]] = {
    "input_file_id": lambda http, name: http.post(
        "/v1/batches",
        json={
            "input_file_id": name,
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        },
    ),
    "after of files": lambda http, name: http.get("/v1/files", params={"after": name}),
    "after of batches": lambda http, name: http.get("/v1/batches", params={"after": name}),
    "part_ids": lambda http, name: http.post(
        f"/v1/uploads/{_new_upload(http)}/complete", json={"part_ids": [name]}
    ),
}


def _new_upload(http: httpx2.Client) -> str:
    wish = {"filename": "f", "purpose": "batch", "bytes": 1, "mime_type": "t"}
    found: str = http.post("/v1/uploads", json=wish).json()["id"]
    return found


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("ask", ASKS)
def test_an_id_leads_nowhere(http: httpx2.Client, ask: str, name: str) -> None:
    answer = ASKS[ask](http, name)
    assert answer.status_code == 400
    assert "SQLite" not in answer.text


@pytest.mark.parametrize("kind", ["files", "batches", "uploads"])
@pytest.mark.parametrize("name", IDS)
def test_an_id_in_a_path_leads_nowhere(http: httpx2.Client, kind: str, name: str) -> None:
    written = "".join(f"%{byte:02X}" for byte in name.encode())
    rests = {"files": ("", "/content"), "batches": ("", "/cancel"), "uploads": ("/cancel",)}
    for rest in rests[kind]:
        for method in ("GET", "DELETE", "POST"):
            answer = http.request(method, f"/v1/{kind}/{written}{rest}")
            assert answer.status_code in (404, 405)
            error_of(answer)


def test_custom_ids_name_no_files(service: Service) -> None:
    """They are only told: the results lie under ids of ours."""
    before = {path.parent for path in service.box.settings.state_dir.parent.rglob("*")}
    lines: list[dict[str, Any]] = [json.loads(completion_line(at)) for at in range(len(NAMES))]
    for line, name in zip(lines, NAMES, strict=True):
        line["custom_id"] = name
    batch = service.run(json.dumps(line) for line in lines)
    assert [row["custom_id"] for row in service.rows(batch.output_file_id)] == list(NAMES)
    after = {path.parent for path in service.box.settings.state_dir.parent.rglob("*")}
    assert after - before <= {service.box.settings.state_dir / "reports"}


def test_a_file_of_ten_mebibyte_lines_fails_by_its_lines(service: Service) -> None:
    """Right at the limit a line is read, beyond it it is passed over; either costs one line's memory."""
    head, tail = completion_line(0, prompt="").encode().split(b'"prompt": "')
    room = 10 * MIB - len(head) - len(tail) - len(b'"prompt": "')
    at_limit = head + b'"prompt": "' + b"y" * room + tail
    assert len(at_limit) == 10 * MIB
    batch = service.run(at_limit + b"\n" + at_limit.replace(b'"c-0"', b'"c-10"') + b"\n")
    assert faults_of(batch) == [("line_too_long", 2, None)]
    batch = service.run(at_limit)
    assert batch.status == "completed"
    (row,) = service.rows(batch.error_file_id)
    assert row["response"]["body"]["error"]["code"] == "context_length_exceeded"
