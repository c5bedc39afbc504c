"""The embedded Valkey: starts, keeps its data, refuses a second owner, dies with its parent."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import redis

import cli.valkey
from cli.errors import StartError
from cli.valkey import embedded_valkey, find_server
from tests.support.processes import is_running, wait_until

_ROOT = Path(__file__).parents[2]


def test_is_configured_as_a_durable_loopback_only_doorbell(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as valkey, redis.Redis.from_url(valkey.url) as client:
        got = {name: client.config_get(name)[name] for name in ("appendonly", "appendfsync")}
        assert got == {"appendonly": "yes", "appendfsync": "everysec"}
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("save")["save"] == ""


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as valkey, redis.Redis.from_url(valkey.url) as client:
        client.set("kept", "yes")
    with embedded_valkey(tmp_path) as valkey, redis.Redis.from_url(valkey.url) as client:
        assert client.get("kept") == b"yes"


def test_needs_its_password_and_tells_it_to_the_owner_only(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as valkey:
        bare = "redis://" + valkey.url.partition("@")[2]
        with redis.Redis.from_url(bare) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        file = tmp_path / "valkey" / "url"
        assert file.read_text() == valkey.url
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not file.exists()


def test_the_server_is_gone_after_the_block(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as valkey, redis.Redis.from_url(valkey.url) as client:
        process_id = client.info("server")["process_id"]
    assert not is_running(process_id)


def test_a_server_that_was_killed_is_there_again_with_what_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.valkey, "_RESTART_S", 0.0)
    news: list[str] = []
    with embedded_valkey(tmp_path) as valkey, redis.Redis.from_url(valkey.url) as client:
        client.set("kept", "yes")
        process_id = client.info("server")["process_id"]
        assert valkey.check() is None
        os.kill(process_id, signal.SIGKILL)

        def is_noticed() -> bool:
            news.extend(filter(None, [valkey.check()]))
            return bool(news)

        wait_until(is_noticed)
        assert "Valkey died (SIGKILL)" in news[0]
        assert valkey.answers()
        assert client.get("kept") == b"yes"
        assert client.info("server")["process_id"] != process_id


def test_a_second_owner_of_a_state_folder_is_refused_by_name(tmp_path: Path) -> None:
    refusal = f"{tmp_path} is in use .*process {os.getpid()}"
    with embedded_valkey(tmp_path), pytest.raises(StartError, match=refusal):
        embedded_valkey(tmp_path).__enter__()
    with embedded_valkey(tmp_path) as valkey:
        assert valkey.url.startswith("redis://")


def test_the_server_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time, redis; from pathlib import Path\n"
        "from cli.valkey import embedded_valkey\n"
        f"with embedded_valkey(Path({str(tmp_path)!r})) as valkey:\n"
        "    print(redis.Redis.from_url(valkey.url).info('server')['process_id'], flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=_ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        process_id = int(parent.stdout.readline())
        assert is_running(process_id)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_until(lambda: not is_running(process_id))
    with embedded_valkey(tmp_path):
        pass  # the folder is free again


def test_a_server_that_does_not_start_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no luck today\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cli.valkey, "find_server", lambda: broken)
    with pytest.raises(StartError, match="no luck today"):
        embedded_valkey(tmp_path / "state").__enter__()


@pytest.mark.parametrize(("version", "accepted"), [("7.2.4", True), ("6.0.16", False)])
def test_a_system_server_is_taken_only_if_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, *, accepted: bool
) -> None:
    system = tmp_path / "redis-server"
    system.write_text(f"#!/bin/sh\necho Redis server v={version} sha=0:0\n")
    system.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (find_server() == system) is accepted


def test_a_port_taken_meanwhile_is_only_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    with embedded_valkey(tmp_path / "first") as valkey:
        taken = int(valkey.url.rpartition(":")[2].partition("/")[0])
        offered = iter([taken, cli.valkey._free_port()])
        monkeypatch.setattr(cli.valkey, "_free_port", lambda: next(offered))
        with embedded_valkey(tmp_path / "second") as second:
            assert f":{taken}/" not in second.url
