"""Requests made up from the server's own OpenAPI: no 5xx, and every answer is one that it promises."""

import subprocess
import venv
from pathlib import Path

import pytest

from jobs.tenant import DEFAULT_TENANT, Limits
from tests.support.server import Running

_LOCK = Path(__file__).parents[2] / "requirements" / "fuzz.lock"
_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
"""Not that what fits a schema is taken: no schema knows which ids there are, or what a file holds."""


@pytest.mark.slow
def test_every_answer_to_what_the_openapi_suggests_is_promised_there(
    fresh: Running, tmp_path: Path
) -> None:
    """Needs a package index. The seed is fixed: what it finds, it finds again."""
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    pip = [str(programs / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--require-hashes", "-r", str(_LOCK)], check=True)
    # The OpenAPI says that a key is asked for, as it is where there is one.
    _, secret = fresh.ledger.keys.create(name="made up", tenant=DEFAULT_TENANT, limits=Limits())
    command = [str(programs / "schemathesis"), "--no-color", "run", f"{fresh.url}/openapi.json"]
    options = ["--seed", "1", "--max-examples", "100", "--checks", ",".join(_CHECKS)]
    options += ["--header", f"Authorization: Bearer {secret}"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr
