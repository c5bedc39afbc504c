"""Checklist 136: the tests that the official client's own authors run, against this server.

They were written for a mock that knows every id; `tests.support.fixed_ids` makes what they name.
"""

import os
import subprocess
import tarfile
import venv
from pathlib import Path
from typing import Final

import pytest

from jobs.ledger.ledger import Ledger, Model
from jobs.settings import Settings
from jobs.stores import STORES
from server.app import create_app
from tests.support.fixed_ids import FixedIds
from tests.support.server import serving

VERSION: Final = "3.54.0"
TOOLS: Final = ("pytest==9.2.0", "pytest-asyncio==1.5.0", "rich==15.0.0")
SUITES: Final = ("test_batches.py", "test_files.py", "test_models.py", "test_uploads.py", "uploads")
MODEL: Final = "gpt-6-astra"
NOT_SO_HERE: Final = {
    "test_method_list_with_all_params": "a page of no items, after an id that never was",
    "Models and delete": "models are served, not kept: there is nothing to delete",
    "Uploads and create and not parts": "an upload of no bytes",
    "complete_with_all_params": "an md5 that is none",
}
"""What a mock says yes to and a server must not, as pytest selects it."""


@pytest.mark.slow
def test_136_the_clients_own_resource_tests(tmp_path: Path, contract_redis_url: str) -> None:
    """Needs a package index: they come with the client's source."""
    folder = unpacked(tmp_path)
    settings = Settings(state_dir=tmp_path / "state", redis_url=f"{contract_redis_url}?db=2")
    ledger = Ledger.open(settings.ledger_url)
    ledger.models.serve(Model(id=MODEL, created_at=5, max_context_tokens=64))
    store = STORES["folder"].open(settings.files_dir)
    app = FixedIds(create_app(settings), ledger, store, part_ids=("string",))
    app.make_file("input_file_id")
    left_out = " or ".join(f"({each})" for each in NOT_SO_HERE)
    command = [str(tmp_path / "venv" / "bin" / "python"), "-m", "pytest", "-q", "-o", "addopts="]
    with serving(app) as url:
        done = subprocess.run(
            [*command, "-k", f"not ({left_out})", *(f"tests/api_resources/{x}" for x in SUITES)],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "TEST_API_BASE_URL": f"{url}/v1"},
            capture_output=True,
            text=True,
            check=False,
        )
    ledger.close()
    assert done.returncode == 0, done.stdout[-10_000:]


def unpacked(folder: Path) -> Path:
    """The client's source, with an environment beside it in which its tests run."""
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", f"openai[aiohttp]=={VERSION}", *TOOLS], check=True)
    source = ["download", "--no-deps", "--no-binary", "openai", f"openai=={VERSION}"]
    subprocess.run([*pip, *source, "--dest", str(folder)], check=True)
    with tarfile.open(folder / f"openai-{VERSION}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"openai-{VERSION}"
