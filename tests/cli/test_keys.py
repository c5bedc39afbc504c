"""`freight keys`, as a person meets it: what is told, where, and how often."""

import contextlib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from jobs.errors import NotFoundError
from jobs.ledger.ledger import Ledger
from jobs.settings import Settings
from jobs.tenant import Caller, Limits, key_id_of


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREIGHT_STATE_DIR", str(tmp_path / "state"))


def keys(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def caller_of(secret: str) -> Caller | None:
    with contextlib.closing(Ledger.open(Settings.from_environment().ledger_url)) as ledger:
        return ledger.keys.caller_of(secret)


def test_a_key_can_be_made_before_anything_ever_ran_and_its_secret_is_all_of_stdout() -> None:
    made = keys("create", "laptop")
    assert made.exit_code == 0
    secret = made.stdout.removesuffix("\n")
    assert caller_of(secret) == Caller()
    assert secret not in made.stderr
    assert str(key_id_of(secret)) in made.stderr


def test_limits_and_tenant_are_the_keys() -> None:
    limits = ("--stored-bytes", "2GiB", "--batches-per-hour", "10", "--enqueued-lines", "1000")
    made = keys("create", "ci", "--tenant", "team-a", *limits)
    assert caller_of(made.stdout.strip()) == Caller(
        tenant="team-a",
        limits=Limits(stored_bytes=2**31, batches_per_hour=10, enqueued_lines=1_000),
    )


def test_the_list_has_all_but_secrets_with_names_as_they_are() -> None:
    assert "no API key" in keys("list").stderr
    secrets = [keys("create", name).stdout.strip() for name in ("[bold]one[/]", "two")]
    keys("create", "three", "--tenant", "t", "--batches-per-hour", "7")
    keys("revoke", str(key_id_of(secrets[0])))
    listed = keys("list").stdout
    head, *rows = listed.splitlines()
    assert head.split()[:2] == ["ID", "TENANT"]
    assert len(rows) == 3
    assert all(secret not in listed for secret in secrets)
    by_name = {row.split()[-1]: row.split() for row in rows}
    assert by_name["[bold]one[/]"][0] == key_id_of(secrets[0])
    assert "revoked" in by_name["[bold]one[/]"]
    assert "good" in by_name["two"]
    assert by_name["three"][1] == "t"
    assert by_name["three"][-4:] == ["-", "7", "-", "three"]


def test_revoking_says_what_has_become_of_the_key_and_of_the_server() -> None:
    first, second = (keys("create", name).stdout.strip() for name in ("one", "two"))
    done = keys("revoke", str(key_id_of(first)))
    assert done.exit_code == 0
    assert "is revoked" in done.stderr
    assert "no key is left" not in done.stderr
    assert (caller_of(first), caller_of(second)) == (None, Caller())
    assert "was revoked before" in keys("revoke", str(key_id_of(first))).stderr
    assert "no key is left" in keys("revoke", str(key_id_of(second))).stderr


def test_an_unknown_id_is_refused() -> None:
    done = keys("revoke", "key_none")
    assert isinstance(done.exception, NotFoundError)  # `main` shows it and exits with 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("create", ""), "is no name of a key"),
        (("create", "x", "--tenant", "a/b"), "is no name of a"),
        (("create", "x", "--batches-per-hour", "0"), "--batches-per-hour"),
        (("create", "x", "--stored-bytes", "many"), "--stored-bytes"),
    ],
)
def test_what_cannot_be_is_refused_as_usage(arguments: tuple[str, ...], told: str) -> None:
    done = keys(*arguments)
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.replace("│", " ").split())  # it comes in a box
    assert "no API key" in keys("list").stderr
