"""Children are kept alive, told apart by why they died, and stopped in order."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli.supervisor
from cli.errors import StartError
from cli.supervisor import Role, Supervisor
from tests.support.processes import is_running, wait_until

_ROOT = Path(__file__).parents[2]

# Writes its process id where the test looks, then its name at its end.
_CHILD = """
import os, pathlib, signal, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
def stop(number, frame):
    with (folder / "order").open("a") as order:
        order.write(name + " ")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / f"{name}.part").write_text(str(os.getpid()))
(folder / f"{name}.part").rename(folder / f"{name}.pid")
while True:
    time.sleep(60)
"""


class _House:
    """A folder of children and the supervisor over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.news: list[str] = []
        self._supervisors: list[Supervisor] = []

    def role(self, name: str, program: str = _CHILD, *, stop_limit_s: float = 10.0) -> Role:
        command = (sys.executable, "-c", program, name, str(self.folder))
        return Role(
            name=name,
            command=command,
            is_ready=lambda process_id: self.process_id(name) == process_id,
            stop_limit_s=stop_limit_s,
        )

    def supervise(self, *roles: Role) -> Supervisor:
        supervisor = Supervisor(
            roles, environment=os.environ, logs_dir=self.folder / "logs", report=self.news.append
        )
        self._supervisors.append(supervisor)
        supervisor.start()
        return supervisor

    def process_id(self, name: str) -> int:
        file = self.folder / f"{name}.pid"
        return int(file.read_text()) if file.exists() else 0

    def close(self) -> None:
        for supervisor in self._supervisors:
            supervisor.stop()


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_House]:
    monkeypatch.setattr(cli.supervisor, "_FIRST_PAUSE_S", 0.01)
    house = _House(tmp_path)
    yield house
    house.close()


def test_children_are_stopped_in_the_order_of_the_table(house: _House) -> None:
    supervisor = house.supervise(*(house.role(name) for name in ("server", "intake", "worker")))
    supervisor.await_ready()
    ids = [house.process_id(name) for name in ("server", "intake", "worker")]
    supervisor.stop()
    assert (house.folder / "order").read_text().split() == ["server", "intake", "worker"]
    assert not any(map(is_running, ids))


def test_each_child_is_told_to_be_up_once(house: _House) -> None:
    house.supervise(house.role("server"), house.role("worker")).await_ready()
    assert sorted(line.split(" is up")[0] for line in house.news) == ["server", "worker"]


def test_a_killed_child_is_started_again(house: _House) -> None:
    supervisor = house.supervise(house.role("worker"))
    supervisor.await_ready()
    first = house.process_id("worker")
    os.kill(first, signal.SIGKILL)

    def is_back() -> bool:
        supervisor.check()
        return house.process_id("worker") not in {first, 0}

    wait_until(is_back)
    assert "worker died (SIGKILL)" in house.news[-1]


def test_a_child_that_has_worked_is_started_again_though_it_finds_its_settings_wrong(
    house: _House,
) -> None:
    """Its memory may be another's for a while, or the disk full."""
    refusing = (
        "import os, pathlib, sys\n"
        "starts = pathlib.Path(sys.argv[2]) / 'starts'\n"
        "number = len(starts.read_text()) if starts.exists() else 0\n"
        "starts.write_text('x' * (number + 1))\n"
        "if number in (1, 2): sys.exit(os.EX_CONFIG)\n"
    )
    supervisor = house.supervise(house.role("worker", refusing + _CHILD))
    supervisor.await_ready()
    first = house.process_id("worker")
    os.kill(first, signal.SIGKILL)

    def is_back() -> bool:
        supervisor.check()
        return house.process_id("worker") not in {first, 0}

    wait_until(is_back)
    assert [line.split(";")[0] for line in house.news[1:]] == [
        "worker died (SIGKILL)",
        "worker died (exit status 78)",
        "worker died (exit status 78)",
    ]


def test_a_wrong_configuration_ends_everything_with_the_childs_own_words(house: _House) -> None:
    program = (
        "import os, sys; print('some log line'); sys.stdout.flush();"
        "print('error: model.gguf is truncated: 7 of 9 bytes', file=sys.stderr);"
        "sys.exit(os.EX_CONFIG)"
    )
    supervisor = house.supervise(house.role("server"), house.role("worker", program))
    with pytest.raises(StartError) as caught:
        supervisor.await_ready()
    assert str(caught.value) == "worker: model.gguf is truncated: 7 of 9 bytes"


def test_a_child_that_never_stands_is_given_up_with_the_end_of_its_log(house: _House) -> None:
    supervisor = house.supervise(house.role("worker", "raise RuntimeError('no luck')"))
    with pytest.raises(StartError, match=r"exit status 1\) at each of 5 starts(.|\n)*no luck"):
        supervisor.await_ready()


def test_a_child_that_does_not_listen_is_killed_within_its_limit(
    house: _House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.supervisor, "_COLD_STOP_LIMIT_S", 0.05)
    deaf = _CHILD.replace("sys.exit(0)", "pass")
    supervisor = house.supervise(house.role("worker", deaf, stop_limit_s=0.05))
    supervisor.await_ready()
    supervisor.stop()
    assert not is_running(house.process_id("worker"))
    assert (house.folder / "order").read_text().split() == ["worker", "worker"], "asked twice"


def test_the_log_of_the_last_run_is_kept_beside(house: _House) -> None:
    for words in ("first", "second"):
        role = house.role("worker", f"print({words!r}, flush=True)\n{_CHILD}")
        supervisor = house.supervise(role)
        supervisor.await_ready()
        supervisor.stop()
        (house.folder / "worker.pid").unlink()
    assert (house.folder / "logs" / "worker.log").read_text() == "second\n"
    assert (house.folder / "logs" / "worker.log.1").read_text() == "first\n"


def test_children_die_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path\n"
        "from cli.supervisor import Role, Supervisor\n"
        "name, folder, child = sys.argv[1], Path(sys.argv[2]), sys.argv[3]\n"
        "role = Role(name=name, command=(sys.executable, '-c', child, name, str(folder)),\n"
        "            is_ready=lambda _: (folder / f'{name}.pid').exists())\n"
        "supervisor = Supervisor([role], environment=os.environ, logs_dir=folder, report=print)\n"
        "supervisor.start(); supervisor.await_ready(); print('up', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, "worker", str(tmp_path), _CHILD]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert "worker is up" in parent.stdout.readline()
        process_id = int((tmp_path / "worker.pid").read_text())
        assert is_running(process_id)
        parent.kill()
        parent.wait()
        wait_until(lambda: not is_running(process_id))


def test_a_command_that_is_not_there_says_so(house: _House) -> None:
    role = Role(name="worker", command=("/no/such/program",), is_ready=lambda _: False)
    supervisor = house.supervise(role)
    with pytest.raises(StartError, match="/no/such/program: No such file"):
        supervisor.await_ready()
