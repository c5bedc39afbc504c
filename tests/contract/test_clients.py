"""Checklist 135: the same flow with the client in its major lines."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support.service import Service

_FLOW = Path(__file__).parents[1] / "clients" / "flow.py"
OLDER = ("1.109.1", "2.54.0")


def ran(python: str, url: str) -> str:
    done = subprocess.run(
        [python, _FLOW, url],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_135_the_flow_with_the_client_of_today(service: Service) -> None:
    assert ran(sys.executable, service.url).startswith("openai 3.")


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDER)
def test_135_the_flow_with_an_older_client(service: Service, tmp_path: Path, version: str) -> None:
    """Needs a package index."""
    venv.create(tmp_path, with_pip=True)
    python = str(tmp_path / "bin" / "python")
    install = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    subprocess.run([*install, f"openai=={version}"], check=True)
    assert ran(python, service.url) == f"openai {version}: all well\n"
