"""`freight submit`, and the README's client, against a small server of the contract's shapes."""

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from cli.errors import StartError
from cli.main import app

_FILE = {
    "id": "file-1",
    "object": "file",
    "bytes": 3,
    "created_at": 1,
    "filename": "in.jsonl",
    "purpose": "batch",
    "status": "processed",
}
_BATCH = {
    "id": "batch_1",
    "object": "batch",
    "completion_window": "24h",
    "created_at": 1,
    "endpoint": "/v1/chat/completions",
    "input_file_id": "file-1",
    "status": "validating",
}


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers each look at the batch with the next of its states."""

    states: ClassVar[list[dict[str, Any]]]
    created: ClassVar[list[dict[str, Any]]]
    shown: ClassVar[set[str | None]]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/files":
            self._answer(json.dumps(_FILE).encode())
        else:
            self.created.append(json.loads(body))
            self._answer(json.dumps(_BATCH).encode())

    def do_GET(self) -> None:
        if self.path.startswith("/v1/files/"):
            self._answer(f'{{"from": "{self.path.split("/")[3]}"}}\n'.encode())
        else:
            self._answer(json.dumps({**_BATCH, **self.states.pop(0)}).encode())

    def _answer(self, body: bytes) -> None:
        self.shown.add(self.headers["Authorization"])
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def url() -> Iterator[str]:
    _Handler.states, _Handler.created, _Handler.shown = [], [], set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def _counts(total: int, completed: int, failed: int = 0) -> dict[str, int]:
    return {"total": total, "completed": completed, "failed": failed}


def _submit(url: str, folder: Path, *, endpoint: str = "/v1/chat/completions") -> tuple[int, str]:
    (folder / "in.jsonl").write_text(json.dumps({"custom_id": "a", "url": endpoint}) + "\n")
    answer = CliRunner().invoke(app, ["submit", str(folder / "in.jsonl"), "--url", url])
    return answer.exit_code, answer.output


def test_a_batch_is_followed_and_its_output_fetched(url: str, tmp_path: Path) -> None:
    _Handler.states = [
        {"status": "in_progress", "request_counts": _counts(2, 1)},
        {"status": "completed", "request_counts": _counts(2, 2), "output_file_id": "file-out"},
    ]
    (tmp_path / "in.errors.jsonl").write_text("of an earlier batch\n")
    status, said = _submit(url, tmp_path)
    assert status == 0, said
    assert json.loads((tmp_path / "in.output.jsonl").read_bytes()) == {"from": "file-out"}
    assert not (tmp_path / "in.errors.jsonl").exists()
    assert "2 of 2 lines answered" in said


def test_failed_lines_are_fetched_too_and_are_no_success(url: str, tmp_path: Path) -> None:
    counts = _counts(2, 1, failed=1)
    state = {"status": "completed", "request_counts": counts}
    _Handler.states = [{**state, "output_file_id": "file-out", "error_file_id": "file-err"}]
    status, said = _submit(url, tmp_path)
    assert status == 1
    assert json.loads((tmp_path / "in.errors.jsonl").read_bytes()) == {"from": "file-err"}
    assert "1 of 2 lines answered" in said


def test_faults_of_validation_are_told_by_line(url: str, tmp_path: Path) -> None:
    fault = {"code": "invalid_json_line", "message": "Not JSON.", "line": 3, "param": None}
    errors = {"object": "list", "data": [fault]}
    _Handler.states = [{"status": "failed", "errors": errors}]
    status, said = _submit(url, tmp_path)
    assert status == 1
    assert "line 3: Not JSON. (invalid_json_line)" in said


def test_the_endpoint_is_what_the_lines_ask_for(url: str, tmp_path: Path) -> None:
    _Handler.states = [{"status": "completed", "request_counts": _counts(1, 1)}]
    _submit(url, tmp_path, endpoint="/v1/completions")
    assert _Handler.created[0]["endpoint"] == "/v1/completions"


@pytest.mark.parametrize(("key", "shown"), [("sk-x", "Bearer sk-x"), ("", "Bearer none")])
def test_the_key_of_the_settings_is_shown(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, key: str, shown: str
) -> None:
    monkeypatch.setenv("FREIGHT_API_KEY", key)
    state = {"status": "completed", "request_counts": _counts(1, 1), "output_file_id": "file-o"}
    _Handler.states = [state]
    assert _submit(url, tmp_path)[0] == 0
    assert _Handler.shown == {shown}


@pytest.mark.parametrize(("name", "out"), [("in.jsonl", "in.jsonl"), ("a.errors.jsonl", "a.jsonl")])
def test_results_that_would_go_over_the_requests_are_refused(
    url: str, tmp_path: Path, name: str, out: str
) -> None:
    (tmp_path / name).write_text("the only copy\n")
    command = ["submit", str(tmp_path / name), "--url", url, "--out", str(tmp_path / out)]
    answer = CliRunner().invoke(app, command)
    assert isinstance(answer.exception, StartError)
    assert (tmp_path / name).read_text() == "the only copy\n"
    assert _Handler.created == [], "nothing was sent"


def test_a_batch_without_results_leaves_those_of_an_earlier_one(url: str, tmp_path: Path) -> None:
    for name in ("in.output.jsonl", "in.errors.jsonl"):
        (tmp_path / name).write_text("of an earlier batch\n")
    _Handler.states = [{"status": "failed"}]
    status, _ = _submit(url, tmp_path)
    assert status == 1
    for name in ("in.output.jsonl", "in.errors.jsonl"):
        assert (tmp_path / name).read_text() == "of an earlier batch\n"


def test_the_readmes_client_waits_for_the_batch_and_shows_both_files(
    url: str, tmp_path: Path
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (line,) = re.findall(r"```json\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "requests.jsonl").write_text(line)
    ended = {"status": "completed", "output_file_id": "file-out", "error_file_id": "file-err"}
    _Handler.states = [{"status": "in_progress"}, ended]
    done = subprocess.run(
        [sys.executable, "-c", program.replace("http://127.0.0.1:8000", url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '{"from": "file-out"}' in done.stdout
    assert '{"from": "file-err"}' in done.stdout
