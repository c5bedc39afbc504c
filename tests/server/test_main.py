"""The server as a process of its own: it serves where no engine and no torch can be imported."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from jobs.ledger.ledger import Ledger, Model
from jobs.settings import Settings
from tests.support.processes import wait_until

_ROOT = Path(__file__).parents[2]

_WITHOUT_ENGINE = """
import sys
class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("engine", "torch", "transformers"):
            raise ImportError(f"{name} is not for the server")
sys.meta_path.insert(0, Refusing())
from jobs.settings import Settings
from server.main import run
run(Settings.from_environment())
"""


@pytest.fixture
def url(tmp_path: Path, valkey_url: str) -> Iterator[str]:
    """A server without an engine, over a ledger that names one model."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = Settings(state_dir=tmp_path, redis_url=valkey_url, port=port)
    with closing(Ledger.open(settings.ledger_url)) as ledger:
        ledger.models.serve(Model(id="tiny", created_at=1, max_context_tokens=8))
    environment = {**os.environ, **settings.to_environment()}
    command = [sys.executable, "-c", _WITHOUT_ENGINE]
    with subprocess.Popen(command, cwd=_ROOT, env=environment) as process:

        def listens() -> bool:
            assert process.poll() is None, "the server ended"
            with socket.socket() as attempt:
                return attempt.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_until(listens)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def test_the_server_runs_where_no_engine_is(url: str) -> None:
    with httpx2.Client(base_url=url) as http:
        assert http.get("/healthz").json()["ledger"] == "ok"
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny"]
