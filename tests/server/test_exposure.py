"""Without a key the server listens on loopback, unless it was told to be open."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.errors import SettingsError
from jobs.ledger.ledger import Ledger
from jobs.settings import Settings
from jobs.tenant import Limits
from server.exposure import check_exposure, is_loopback


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path)


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    with contextlib.closing(Ledger.open(settings.ledger_url)) as ledger:
        yield ledger


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_is_for_this_machine(host: str, settings: Settings, ledger: Ledger) -> None:
    assert is_loopback(host)
    assert not check_exposure(dataclasses.replace(settings, host=host), ledger.keys)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "localhost.example.org"])
def test_other_addresses_need_a_key_or_permission(
    host: str, settings: Settings, ledger: Ledger
) -> None:
    settings = dataclasses.replace(settings, host=host)
    with pytest.raises(SettingsError, match=r"keys create NAME.*FREIGHT_ALLOW_KEYLESS=true"):
        check_exposure(settings, ledger.keys)
    assert not check_exposure(dataclasses.replace(settings, allow_keyless=True), ledger.keys)
    key, _ = ledger.keys.create(name="k", tenant="t", limits=Limits())
    assert check_exposure(settings, ledger.keys)
    ledger.keys.revoke(key.id)
    assert check_exposure(settings, ledger.keys)  # it answers nobody then
