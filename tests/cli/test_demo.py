"""The demo's input is what it claims to be, its verdict is strict, and it runs beside a server."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cli.demo import Figures, demo_settings, is_conserved
from cli.demo_input import demo_requests, write_demo_input
from cli.valkey import embedded_valkey
from jobs.batch import Endpoint
from jobs.line import parse_request_line
from jobs.settings import Settings

_ROOT = Path(__file__).parents[2]


def _num_characters(request: Mapping[str, Any]) -> int:
    return sum(len(message["content"]) for message in request["body"]["messages"])


def test_every_line_is_a_valid_request_with_its_own_id(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    num_requests = write_demo_input(path, model="some-model")
    lines = path.read_bytes().splitlines()
    assert num_requests == len(lines) >= 120
    parsed = [
        parse_request_line(line, line=number, endpoint=Endpoint.CHAT_COMPLETIONS)
        for number, line in enumerate(lines, start=1)
    ]
    assert all(faults == [] for _, faults in parsed)
    assert len({request.custom_id for request, _ in parsed if request}) == num_requests


def test_lengths_are_clearly_unequal() -> None:
    requests = list(demo_requests("some-model"))
    sizes = sorted(map(_num_characters, requests))
    assert sizes[-1] > 15 * sizes[0]
    assert sizes[len(sizes) // 2] > 2 * sizes[len(sizes) // 10]
    assert {request["body"]["max_tokens"] for request in requests} == {16, 24, 32, 64, 96}


def test_the_input_is_the_same_at_every_call_and_greedy() -> None:
    requests = list(demo_requests("some-model"))
    assert requests == list(demo_requests("some-model"))
    assert {request["body"]["temperature"] for request in requests} == {0}


def _answer(custom_id: str, status_code: int = 200) -> dict[str, Any]:
    usage = {"prompt_tokens": 30, "completion_tokens": 10}
    response = {"status_code": status_code, "body": {"usage": usage}}
    return {"custom_id": custom_id, "response": response, "error": None}


def test_only_one_answer_to_each_request_is_conservation() -> None:
    asked = [{"custom_id": "a"}, {"custom_id": "b"}]
    assert is_conserved(asked, [_answer("b"), _answer("a")])
    assert not is_conserved(asked, [_answer("a")])
    assert not is_conserved(asked, [_answer("a"), _answer("a"), _answer("b")])
    assert not is_conserved(asked, [_answer("a"), _answer("c")])
    assert not is_conserved(asked, [_answer("a"), _answer("b", status_code=400)])


def test_figures_count_what_the_output_says() -> None:
    figures = Figures.of([_answer("a"), _answer("b")], wall_s=2.0)
    text = figures.as_text()
    assert "2 lines answered in 2.0 s" in text
    assert "10.0 /s" in text, "20 output tokens"
    assert "40.0 /s" in text, "80 tokens in all"
    assert json.dumps([figures.input_tokens, figures.output_tokens]) == "[60, 20]"


def test_the_demo_shares_model_and_weights_with_a_server_and_nothing_else(tmp_path: Path) -> None:
    usual = Settings(
        state_dir=tmp_path,
        database_url="postgresql://somewhere/ledger",
        redis_url="redis://somewhere:6379/0",
        host="0.0.0.0",
    )
    usual.models_dir.mkdir()
    (usual.models_dir / "own.gguf").touch()
    settings = demo_settings(usual, model="own")
    assert settings.model == str(usual.models_dir / "own.gguf")
    assert settings.weights_dir == usual.weights_dir
    assert settings.state_dir == tmp_path / "demo"
    assert settings.ledger_url == f"sqlite:///{tmp_path}/demo/ledger.db"
    assert (settings.redis_url, settings.host) == (None, "127.0.0.1")
    assert settings.port != usual.port


@pytest.mark.slow
def test_the_demo_answers_every_line_in_a_folder_that_a_server_holds(
    tmp_path: Path, demo_model: Path
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FREIGHT_")}
    with embedded_valkey(tmp_path):  # as a running `freight serve` has it
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "demo", "--model", str(demo_model)],
            cwd=_ROOT,
            env={**clean, "FREIGHT_STATE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    num_requests = len((tmp_path / "demo" / "requests.jsonl").read_bytes().splitlines())
    answers = (tmp_path / "demo" / "requests.output.jsonl").read_bytes().splitlines()
    assert len(answers) == num_requests >= 120
    assert f"{num_requests} lines answered in" in done.stdout
    assert f"state folder  {tmp_path / 'demo'}" in done.stdout
    assert "stopped" in done.stderr
    assert not (tmp_path / "demo" / "valkey" / "url").exists()
    assert list((tmp_path / "spill" / "packs").iterdir()), "where the server's own weights lie"
