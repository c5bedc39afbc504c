"""Checklist 135: the same flow with the client in its major lines, and with the one for Node."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support.service import Service

_CLIENTS = Path(__file__).parents[1] / "clients"
_FLOW = _CLIENTS / "flow.py"
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


def test_the_lock_for_node_has_hashes_and_names_no_registry() -> None:
    lock = json.loads((_CLIENTS / "node" / "package-lock.json").read_text())
    root = lock["packages"].pop("")
    assert (
        root["dependencies"]
        == json.loads((_CLIENTS / "node" / "package.json").read_text())["dependencies"]
    )
    assert lock["packages"]["node_modules/openai"]["version"] == root["dependencies"]["openai"]
    for package in lock["packages"].values():
        assert package["integrity"].startswith("sha512-")
        assert "resolved" not in package


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="no Node here: its client is not tried")
def test_the_flow_with_the_client_for_node(service: Service, tmp_path: Path) -> None:
    """Needs a package index. Its newest line that runs on Node 20, as the lock says, hashes checked."""
    folder = shutil.copytree(_CLIENTS / "node", tmp_path / "node")
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(install, cwd=folder, check=True, timeout=300)
    done = subprocess.run(
        ["node", "flow.mjs", service.url],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    version = json.loads((folder / "package.json").read_text())["dependencies"]["openai"]
    assert done.stdout == f"openai for Node {version}: all well\n"
