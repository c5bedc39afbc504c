"""Options that commands share: each goes over its setting, in every command that has it."""

import dataclasses
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

import cli.run
import cli.serve
import worker.main
from cli.main import app
from cli.offline import Tally
from cli.options import overridden
from cli.result_files import ResultPaths
from jobs.settings import ComputeDtype, Settings

_OPTIONS: dict[str, tuple[str, str, Any]] = {
    "--gpu-memory": ("2GiB", "gpu_memory_bytes", 2 * 2**30),
    "--host-memory": ("1.5GiB", "host_memory_bytes", 3 * 2**29),
    "--disk-space": ("100MB", "disk_space_bytes", 10**8),
    "--compute-dtype": ("bfloat16", "compute_dtype", ComputeDtype.BFLOAT16),
    "--spill-dir": ("/big/disk", "spill_dir", Path("/big/disk")),
    "--policy": ("/plans/policy.json", "policy", Path("/plans/policy.json")),
    "--trace": ("/tmp/trace.json", "trace_file", Path("/tmp/trace.json")),
}
_ARGUMENTS = {"run": ["in.jsonl", "out.jsonl"], "serve": [], "worker": []}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What each command would have run with."""
    found: list[Settings] = []

    def answer(source: Path, paths: ResultPaths, settings: Settings, *, resume: bool) -> Tally:
        found.append(settings)
        return Tally()

    def running(settings: Settings) -> NoReturn:
        found.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.run, "answer_file", answer)
    monkeypatch.setattr(cli.serve, "running", running)
    monkeypatch.setattr(worker.main, "run_worker", found.append)
    return found


@pytest.mark.parametrize("command", list(_ARGUMENTS))
@pytest.mark.parametrize("given", [(), tuple(_OPTIONS)], ids=["without", "with"])
def test_an_option_goes_over_the_environment(
    asked: list[Settings], tmp_path: Path, command: str, given: tuple[str, ...]
) -> None:
    (tmp_path / "model.gguf").touch()
    environment = {
        "FREIGHT_STATE_DIR": str(tmp_path),
        "FREIGHT_MODEL": str(tmp_path / "model.gguf"),
        "FREIGHT_REDIS_URL": "redis://nowhere",
        "FREIGHT_GPU_MEMORY_BYTES": "1",
        "FREIGHT_HOST_MEMORY_BYTES": "2",
        "FREIGHT_DISK_SPACE_BYTES": "3",
        "FREIGHT_SPILL_DIR": "/small/disk",
        "FREIGHT_COMPUTE_DTYPE": "float32",
        "FREIGHT_TRACE_FILE": "/tmp/other.json",
    }
    words = [word for option in given for word in (option, _OPTIONS[option][0])]
    arguments = [command, *_ARGUMENTS[command], *words]
    done = CliRunner().invoke(app, arguments, env=environment)
    assert done.exit_code == 0, done.output
    (settings,) = asked
    expected = {name: value for _, name, value in (_OPTIONS[option] for option in given)}
    from_environment = Settings.from_environment(environment)
    assert settings == dataclasses.replace(from_environment, **expected)


def test_what_is_not_given_stays_and_nothing_counts_as_given() -> None:
    settings = Settings(state_dir=Path("/s"), gpu_memory_bytes=7, host="::1")
    assert overridden(settings, gpu_memory_bytes=None, host=None) == settings
    assert overridden(settings, gpu_memory_bytes=0).gpu_memory_bytes == 0


def test_paths_become_absolute_for_roles_that_run_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = overridden(Settings(state_dir=tmp_path), trace_file=Path("trace.json"))
    assert settings == dataclasses.replace(settings, trace_file=tmp_path / "trace.json")
