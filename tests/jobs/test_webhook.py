"""Which addresses may be called, and which secrets and places are none."""

import base64

import pytest

from jobs.errors import SettingsError
from jobs.networks import Networks
from jobs.settings import Settings
from jobs.webhook import check_secret, check_url

SECRET = f"whsec_{base64.b64encode(bytes(32)).decode()}"


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1"),
        *("ff02::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"),
    ],
)
def test_what_is_not_public_may_not_be_called(address: str) -> None:
    assert not Networks().allow(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_what_is_public_may(address: str) -> None:
    assert Networks().allow(address)


def test_networks_that_are_named_may_be_called_and_no_others() -> None:
    networks = Networks("10.0.0.0/8, ::1/128")
    assert networks.allow("10.1.2.3")
    assert networks.allow("::ffff:10.1.2.3")
    assert networks.allow("::1")
    assert not networks.allow("127.0.0.1")
    assert not networks.allow("fc00::1")


@pytest.mark.parametrize("text", ["10.0.0.1/8", "private", "10.0.0.0/33"])
def test_what_is_no_network_stops_the_start(text: str) -> None:
    with pytest.raises(SettingsError, match="FREIGHT_WEBHOOK_NETWORKS"):
        Settings.from_environment({"FREIGHT_WEBHOOK_NETWORKS": text})


@pytest.mark.parametrize(
    "secret",
    [
        *("", "hunter2", "whsec_", "whsec_!!!!", f"whsec_{'A' * 20}", f"whsec_{'A' * 400}"),
        *(SECRET[6:], "whsec_ÄÄÄÄÄÄÄÄÄÄÄÄÄÄÄÄÄÄÄÄÄÄÄÄ", f"{SECRET}x"),
    ],
)
def test_a_wrong_secret_is_refused_and_not_quoted(secret: str) -> None:
    with pytest.raises(ValueError, match="a webhook's secret is") as refusal:
        check_secret(secret)
    assert len(secret) < 7 or secret not in str(refusal.value)
    if secret:
        with pytest.raises(SettingsError, match="FREIGHT_WEBHOOK_SECRET") as stopped:
            Settings.from_environment({"FREIGHT_WEBHOOK_SECRET": secret})
        assert len(secret) < 7 or secret not in str(stopped.value)


def test_a_right_secret_is_read_and_shown_to_nobody() -> None:
    settings = Settings.from_environment(
        {"FREIGHT_WEBHOOK_URL": "https://example.com/a", "FREIGHT_WEBHOOK_SECRET": SECRET}
    )
    assert settings.webhook_secret == SECRET
    assert SECRET not in repr(settings)
    with pytest.raises(SettingsError, match="FREIGHT_WEBHOOK_SECRET to sign with"):
        Settings.from_environment({"FREIGHT_WEBHOOK_URL": "https://example.com/a"})


@pytest.mark.parametrize(
    "url",
    [
        *("", "example.com", "//example.com/", "https://", "file:///etc/passwd", "HTTP:/x"),
        *("https://a b/", "https://a/\r\nX-Y: z", "https://ä.example/", "https://u@a/"),
        *("https://a:0/", "https://a:port/", "https://[::1/", f"https://a/{'x' * 2_048}"),
    ],
)
def test_what_is_no_place_to_post_to_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        check_url(url)


def test_a_place_to_post_to_comes_in_parts() -> None:
    parts = check_url("https://[2606:4700::1]:8443/a/b?c=d")
    assert (parts.hostname, parts.port, parts.path) == ("2606:4700::1", 8443, "/a/b")
