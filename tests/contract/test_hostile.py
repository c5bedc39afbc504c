"""Whatever is sent, the answer is no 5xx, and memory stays bounded."""

import json
import tracemalloc
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.batch import Endpoint
from jobs.line import parse_request_line
from tests.support.box import Box, completion_line
from tests.support.service import Service, faults_of
from tests.support.wire import error_of
from worker.context import IntakeContext
from worker.finalize import finalize_batch
from worker.input_lines import InputLine
from worker.inspection import Inspection
from worker.intake import validate_batch

texts = st.text(st.characters(codec=None), max_size=20)  # halves of surrogate pairs too
numbers = st.integers() | st.floats() | st.just(10**400) | st.just(-0.0)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
fuzzed = settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def mutations_of(right: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The object with some of its fields replaced, and maybe others beside."""
    changes = st.dictionaries(st.sampled_from(sorted(right)) | texts, values, max_size=3)
    return changes.map(lambda changed: {**right, **changed})


def check(answer: httpx2.Response) -> None:
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, answer.text
        error_of(answer)


WISHES: dict[str, dict[str, Any]] = {
    "/v1/batches": {
        "input_file_id": "file-x",
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        "metadata": {"a": "b"},
        "output_expires_after": {"anchor": "created_at", "seconds": 3_600},
        "expires_after": {"anchor": "created_at", "seconds": 60},
        "priority": 5,
        "webhook": {"url": "https://example.com/hook", "secret": f"whsec_{'A' * 32}"},
    },
    "/v1/uploads": {"filename": "a", "purpose": "batch", "bytes": 1, "mime_type": "t"},
    "/v1/uploads/upload_x/complete": {"part_ids": ["part_x"], "md5": "0" * 32},
}


@pytest.mark.parametrize("path", WISHES)
def test_no_json_body_is_a_5xx(http: httpx2.Client, file_id: str, path: str) -> None:
    right = dict(WISHES[path])
    if "input_file_id" in right:
        right["input_file_id"] = file_id

    @fuzzed
    @given(mutations_of(right))
    def refused(body: dict[str, Any]) -> None:
        headers = {"content-type": "application/json"}
        check(http.post(path, content=json.dumps(body), headers=headers))

    refused()


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        *((path, "application/json") for path in WISHES),
        ("/v1/files", "multipart/form-data; boundary=B"),
        ("/v1/batches/batch_x/cancel", "application/json"),
        ("/v1/chat/completions", "application/json"),
    ],
)
def test_no_bytes_are_a_5xx(http: httpx2.Client, path: str, content_type: str) -> None:
    pieces = st.sampled_from([b"--B", b"\r\n", b"{", b"[", b'"', b"\xff", b"\x00", b"file"])
    bodies = st.lists(pieces | st.binary(max_size=20), max_size=10).map(b"".join)

    @fuzzed
    @given(bodies)
    def refused(body: bytes) -> None:
        check(http.post(path, content=body, headers={"content-type": content_type}))

    refused()


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches"])
def test_no_query_is_a_5xx(http: httpx2.Client, path: str) -> None:
    words = st.text(max_size=20) | st.integers().map(str)
    queries = st.dictionaries(
        st.sampled_from(["limit", "after", "order", "purpose"]), words, max_size=4
    )

    @fuzzed
    @given(queries)
    def answered(query: dict[str, str]) -> None:
        check(http.get(path, params=query))

    answered()


@settings(fuzzed, max_examples=10)
@given(st.binary(max_size=60))
def test_no_path_is_a_5xx(http: httpx2.Client, name: bytes) -> None:
    written = "".join(f"%{byte:02X}" for byte in name)
    for path in (f"/v1/files/{written}", f"/v1/files/{written}/content", f"/v1/batches/{written}"):
        check(http.get(path))
    check(http.post(f"/v1/uploads/{written}/cancel"))
    check(http.get(f"/v1/models/{written}"))


LINE = json.loads(completion_line(0))


@settings(max_examples=300)
@given(st.binary(max_size=80) | mutations_of(LINE).map(lambda line: json.dumps(line).encode()))
def test_no_line_makes_validation_fail(raw: bytes) -> None:
    request, faults = parse_request_line(raw, line=1, endpoint=Endpoint.COMPLETIONS)
    assert (request is None) == bool(faults)
    assert all(fault.line == 1 and len(fault.message) < 1_000 for fault in faults)


@settings(max_examples=60)
@given(mutations_of(LINE["body"]))
def test_no_body_makes_validation_fail(body: dict[str, Any]) -> None:
    raw = json.dumps({**LINE, "body": body}).encode()
    request, faults = parse_request_line(raw, line=1, endpoint=Endpoint.COMPLETIONS)
    assert (request is None) == bool(faults)


def test_odd_lines_of_one_batch_settle_one_by_one(box: Box, context: IntakeContext) -> None:
    """What passes the outer check is answered line by line, whatever its body asks."""
    bodies: list[dict[str, Any]] = []

    @settings(max_examples=100, database=None)
    @given(mutations_of({"prompt": "x", "max_tokens": -1}))
    def collect(body: dict[str, Any]) -> None:
        bodies.append({**body, "model": "tiny", "stream": False})

    collect()
    lines = [
        json.dumps({**LINE, "custom_id": f"c-{at}", "body": each})
        for at, each in enumerate(bodies)
        if each.get("prompt") not in (None, "", [])
    ]
    readable = [
        line
        for line in lines
        if parse_request_line(line.encode(), line=1, endpoint=Endpoint.COMPLETIONS)[0] is not None
    ]
    batch_id = box.add(readable)
    validate_batch(context, batch_id)
    box.cancel(batch_id)
    finalize_batch(context, batch_id)
    batch = box.batch(batch_id)
    rows = box.rows(batch.output_file_id) + box.rows(batch.error_file_id)
    assert len(rows) == len(readable) > 50


HOSTILE: dict[str, tuple[bytes, str]] = {
    "ten megabytes of brackets": (b"[" * 10_000_000, "invalid_json_line"),
    "ten megabytes of digits": (b"1" * 10_000_000, "invalid_json_line"),
    "a deep body": (b'{"body":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "invalid_json_line"),
    "a number beyond floats": (b'{"body": 1e999999}', "invalid_json_line"),
    "invalid UTF-8": (b'{"custom_id": "' + b"\xc0\x80" * 1_000 + b'"}', "invalid_json_line"),
    "keys twice": (b'{"a": 1, "a": 1}', "invalid_json_line"),
    "a line of eleven mebibytes": (b'"' + b"x" * (11 * 2**20) + b'"', "line_too_long"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_line_costs_little(service: Service, kind: str) -> None:
    raw, code = HOSTILE[kind]
    batch = service.run(completion_line(0).encode() + b"\n" + raw + b"\n" + raw)
    assert batch.status == "failed"
    assert faults_of(batch) == [(code, 2, None), (code, 3, None)]


def test_repeated_faults_are_not_hoarded() -> None:
    inspection = Inspection(
        endpoint=Endpoint.COMPLETIONS,
        served_model="tiny",
        max_lines=50_000,
        max_line_bytes=10 * 2**20,
    )
    raw = json.dumps({"x" * 1_000: 1, "custom_id": "é" * 600}).encode()
    tracemalloc.start()
    faults = inspection.look(
        InputLine(number=number, offset_bytes=0, raw=raw) for number in range(1, 5_001)
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(faults) == 101
    assert peak < 2**20
