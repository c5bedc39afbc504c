"""The commands, as a person at a terminal meets them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app

_ROOT = Path(__file__).parents[2]


def _freight(
    *arguments: str, state_dir: Path, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FREIGHT_")}
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=state_dir,
        env={
            **clean,
            "PYTHONPATH": str(_ROOT),
            "FREIGHT_STATE_DIR": str(state_dir),
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "command", ["serve", "run", "submit", "demo", "keys", "server", "intake", "worker", "healthy"]
)
def test_every_command_explains_itself(command: str) -> None:
    answer = CliRunner().invoke(app, [command, "--help"])
    assert answer.exit_code == 0
    assert "Usage" in answer.output


def test_the_version_is_told() -> None:
    answer = CliRunner().invoke(app, ["--version"])
    assert answer.exit_code == 0
    assert answer.output.startswith("freight 0.")


def test_help_loads_neither_torch_nor_redis_nor_the_client() -> None:
    program = (
        "import sys, cli.main\n"
        "slow = {'torch', 'transformers', 'redis', 'rq', 'openai', 'fastapi', 'sqlalchemy'}\n"
        "sys.exit(str(slow & sys.modules.keys()) if slow & sys.modules.keys() else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("role", ["server", "intake", "worker", "healthy"])
def test_a_role_without_redis_is_refused_with_advice(role: str, tmp_path: Path) -> None:
    done = _freight(role, state_dir=tmp_path)
    assert done.returncode == os.EX_CONFIG
    assert done.stderr.startswith("error: FREIGHT_REDIS_URL is not set")


def test_a_wrong_setting_is_refused_by_name(tmp_path: Path) -> None:
    done = _freight("serve", state_dir=tmp_path, environment={"FREIGHT_PORT": "many"})
    assert done.returncode == os.EX_CONFIG
    assert "error: FREIGHT_PORT='many'" in done.stderr


def test_serve_without_any_model_says_how_to_get_one(tmp_path: Path) -> None:
    done = _freight("serve", state_dir=tmp_path)
    assert done.returncode == os.EX_CONFIG
    assert "make model" in done.stderr


def test_serve_refuses_a_port_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = _freight("serve", "--model", "model.gguf", "--port", port, state_dir=tmp_path)
    assert done.returncode == os.EX_CONFIG
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr


@pytest.mark.parametrize("command", [("serve", "--model", "model.gguf"), ("server",)])
def test_without_a_key_nothing_listens_beyond_this_machine(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").touch()
    environment = {"FREIGHT_REDIS_URL": "redis://127.0.0.1:1/0", "FREIGHT_HOST": "0.0.0.0"}
    done = _freight(*command, state_dir=tmp_path, environment=environment)
    assert done.returncode == os.EX_CONFIG
    assert "error: FREIGHT_HOST='0.0.0.0': there is no API key yet" in done.stderr
    assert "freight keys create NAME" in done.stderr


def test_serve_refuses_a_redis_that_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    environment = {"FREIGHT_REDIS_URL": "redis://127.0.0.1:1/0", "FREIGHT_PORT": "0"}
    done = _freight("serve", "--model", "model.gguf", state_dir=tmp_path, environment=environment)
    assert done.returncode == os.EX_CONFIG
    assert "no Redis answers at 127.0.0.1:1" in done.stderr


def test_submit_of_a_missing_file_names_it(tmp_path: Path) -> None:
    done = _freight("submit", "nothing.jsonl", state_dir=tmp_path)
    assert done.returncode == os.EX_CONFIG
    assert "there is no file nothing.jsonl" in done.stderr


def test_submit_without_a_server_says_so(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text("{}\n")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers here
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = _freight("submit", "some.jsonl", "--url", url, state_dir=tmp_path)
    assert done.returncode == 1
    assert f"nothing answers at {url}" in done.stderr


def test_nobody_listening_is_not_healthy(tmp_path: Path) -> None:
    environment = {"FREIGHT_REDIS_URL": "redis://127.0.0.1:1/0"}
    assert _freight("healthy", state_dir=tmp_path, environment=environment).returncode == 1
