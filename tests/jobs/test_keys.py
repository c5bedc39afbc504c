"""API keys: secrets that are kept nowhere, found again by their public half, good until revoked."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.errors import NotFoundError
from jobs.ledger.ledger import Ledger
from jobs.tenant import (
    Caller,
    Limits,
    checked_name,
    checked_tenant,
    digest_of,
    is_secret_of,
    key_id_of,
    new_key_id,
    new_secret,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def create(ledger: Ledger, tenant: str = "t", **limits: int) -> tuple[str, str]:
    """The new key's id and secret."""
    key, secret = ledger.keys.create(name="n", tenant=tenant, limits=Limits(**limits))
    return key.id, secret


def test_a_secret_tells_its_id_and_nothing_else_can_be_told_from_that() -> None:
    key_id = new_key_id()
    secrets = {new_secret(key_id) for _ in range(100)}
    assert len(secrets) == 100
    assert {key_id_of(secret) for secret in secrets} == {key_id}
    # 256 bits in base64url, behind what everybody may know.
    assert {len(secret.removeprefix(f"sk-freight-{key_id[4:]}-")) for secret in secrets} == {43}


@pytest.mark.parametrize(
    "text",
    ["", "none", "sk-freight-", "sk-freight-0123-x", "sk-freight-0123456789abcdef-", "\ud800"],
)
def test_what_is_no_secret_tells_no_id(text: str) -> None:
    assert key_id_of(text) is None


def test_a_digest_is_sha_256_and_fits_one_secret() -> None:
    secret = new_secret(new_key_id())
    assert digest_of(secret) == hashlib.sha256(secret.encode()).hexdigest()
    assert is_secret_of(secret, digest_of(secret))
    assert not is_secret_of(f"{secret}x", digest_of(secret))
    assert not is_secret_of("\ud800", digest_of(secret))


def test_a_secret_stands_for_its_tenant_and_limits(ledger: Ledger) -> None:
    _, secret = create(ledger, "a", stored_bytes=5, batches_per_hour=6, enqueued_lines=7)
    limits = Limits(stored_bytes=5, batches_per_hour=6, enqueued_lines=7)
    assert ledger.keys.caller_of(secret) == Caller(tenant="a", limits=limits)
    _, unlimited = create(ledger, "b")
    assert ledger.keys.caller_of(unlimited) == Caller(tenant="b", limits=Limits())


def test_the_file_of_the_ledger_does_not_hold_the_secret(ledger: Ledger, tmp_path: Path) -> None:
    key_id, secret = create(ledger)
    ledger.close()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key_id.encode() in kept
    assert secret.startswith(f"sk-freight-{key_id[4:]}-")
    random_part = secret.removeprefix(f"sk-freight-{key_id[4:]}-")
    assert random_part.encode() not in kept


def test_a_secret_of_another_key_is_nobodys(ledger: Ledger) -> None:
    (first, secret), (second, _) = create(ledger, "a"), create(ledger, "b")
    forged = secret.replace(first[4:], second[4:])
    assert key_id_of(forged) == second
    assert ledger.keys.caller_of(forged) is None
    assert ledger.keys.caller_of(new_secret(new_key_id())) is None


def test_a_revoked_key_is_nobodys_and_still_a_key(ledger: Ledger) -> None:
    assert not ledger.keys.exist()
    key_id, secret = create(ledger)
    assert ledger.keys.exist()
    assert ledger.keys.revoke(key_id)
    assert not ledger.keys.revoke(key_id)
    assert ledger.keys.caller_of(secret) is None
    assert ledger.keys.exist()
    (key,) = ledger.keys.all()
    assert (key.id, key.name, key.tenant) == (key_id, "n", "t")
    assert key.revoked_at is not None


def test_revoking_what_is_no_key_says_so(ledger: Ledger) -> None:
    with pytest.raises(NotFoundError, match="'key_none'"):
        ledger.keys.revoke("key_none")


def test_another_process_sees_a_key_at_once(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    key_id, secret = create(other, "a")
    assert ledger.keys.caller_of(secret) == Caller(tenant="a")
    other.keys.revoke(key_id)
    other.close()
    assert ledger.keys.caller_of(secret) is None


@pytest.mark.parametrize("text", ["a", "default", "team-1.x_y", "x" * 64])
def test_names_that_tenants_may_have(text: str) -> None:
    assert checked_tenant(text) == text


@pytest.mark.parametrize("text", ["", "-a", "a b", "ä", "a/b", "x" * 65, "a\n"])
def test_names_that_tenants_may_not_have(text: str) -> None:
    with pytest.raises(ValueError, match="no name of a tenant"):
        checked_tenant(text)


def test_a_keys_name_is_one_printable_line() -> None:
    assert checked_name("Ada's laptop [2]") == "Ada's laptop [2]"
    for text in ("", "  ", "a\nb", "x" * 101, "\x1b[31m"):
        with pytest.raises(ValueError, match="no name of a key"):
            checked_name(text)
