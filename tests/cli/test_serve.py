"""`freight serve` as one program: up, stopped in order, and gone with all that it started."""

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from cli.serve import _child_environment, _ready_text
from jobs.settings import Settings
from tests.support.processes import is_running, wait_until

_ROOT = Path(__file__).parents[2]

# The real command with a table of dummy children in place of the real roles.
_SERVE = """
import os, signal, sys
# As a terminal starts it: what runs in a script's background is born with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
import cli.serve
from cli.supervisor import Role
folder, child = Path(sys.argv[1]), sys.argv[2]
def role(name):
    return Role(name=name, command=(sys.executable, "-c", child, name, str(folder)),
                is_ready=lambda _: (folder / f"{name}.pid").exists())
cli.serve.roles = lambda settings: [role("server"), role("intake"), role("worker")]
cli.serve.serve(port=0)
"""

_CHILD = """
import os, pathlib, signal, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
def stop(number, frame):
    with (folder / "order").open("a") as order:
        order.write(name + " ")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
assert os.environ["FREIGHT_REDIS_URL"].startswith("redis://:")
assert os.environ["FREIGHT_MODEL"] == str(folder / "model.gguf")
(folder / f"{name}.part").write_text(str(os.getpid()))
(folder / f"{name}.part").rename(folder / f"{name}.pid")
while True:
    time.sleep(60)
"""


@pytest.fixture
def serving(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    (tmp_path / "model.gguf").touch()
    environment = {
        **os.environ,
        "FREIGHT_STATE_DIR": str(tmp_path / "state"),
        "FREIGHT_MODEL": str(tmp_path / "model.gguf"),
    }
    command = [sys.executable, "-c", _SERVE, str(tmp_path), _CHILD]
    with subprocess.Popen(
        command, cwd=_ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "is ready at http://127.0.0.1" in line:
                break
        yield process
        process.kill()


def _children(folder: Path) -> list[int]:
    return [int((folder / f"{name}.pid").read_text()) for name in ("server", "intake", "worker")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_in_order_and_that_is_success(
    serving: "subprocess.Popen[str]", tmp_path: Path, number: signal.Signals
) -> None:
    children = _children(tmp_path)
    serving.send_signal(number)
    assert serving.wait(30) == 0
    assert (tmp_path / "order").read_text().split() == ["server", "intake", "worker"]
    assert not any(map(is_running, children))
    assert not (tmp_path / "state" / "valkey" / "url").exists()


def test_a_valkey_that_died_is_started_again_where_the_roles_look_for_it(
    serving: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    url = (tmp_path / "state" / "valkey" / "url").read_text()

    def process_id() -> int:
        with contextlib.suppress(redis.RedisError), redis.Redis.from_url(url) as client:
            return int(client.info("server")["process_id"])
        return 0

    first = process_id()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: process_id() not in {0, first})
    assert serving.poll() is None


def test_nothing_outlives_a_killed_serve(serving: "subprocess.Popen[str]", tmp_path: Path) -> None:
    children = _children(tmp_path)
    serving.kill()
    serving.wait()
    wait_until(lambda: not any(map(is_running, children)))


def test_a_child_that_finds_its_settings_wrong_ends_serve(
    tmp_path: Path,
) -> None:
    (tmp_path / "model.gguf").touch()
    program = _SERVE.replace("cli.serve.serve(port=0)", "import cli.main; cli.main.main()")
    child = "import os, sys; print('error: the model is truncated'); sys.exit(os.EX_CONFIG)"
    script = tmp_path / "program.py"
    script.write_text(
        program.replace("sys.argv[1]", repr(str(tmp_path))).replace("sys.argv[2]", repr(child))
    )
    done = subprocess.run(
        [sys.executable, str(script), "serve", "--port", "0"],
        cwd=_ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "FREIGHT_STATE_DIR": str(tmp_path / "state"),
            "FREIGHT_MODEL": str(tmp_path / "model.gguf"),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == os.EX_CONFIG
    # All three end so, and whichever is first speaks.
    assert re.search(r"error: (server|intake|worker): the model is truncated", done.stderr)


def test_children_get_the_settings_and_no_variable_that_these_leave_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FREIGHT_DATABASE_URL", "postgresql://somewhere/ledger")
    settings = Settings(state_dir=tmp_path, model="some.gguf")
    environment = _child_environment(dataclasses.replace(settings, api_key="secret"))
    assert environment["PATH"] == os.environ["PATH"]
    assert Settings.from_environment(environment) == settings


def test_the_command_that_a_ready_server_shows_can_be_typed(tmp_path: Path) -> None:
    shown = _ready_text("http://127.0.0.1:8000", has_keys=False).strip().splitlines()[1]
    *command, file, option, url = shlex.split(shown)
    assert (file, option, url) == ("requests.jsonl", "--url", "http://127.0.0.1:8000")
    done = subprocess.run(
        [*command, "--help"], cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "Send FILE" in done.stdout
