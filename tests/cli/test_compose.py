"""The container files agree with one another and with the settings."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.settings import Settings

_ROOT = Path(__file__).parents[2]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Knows Compose's `!reset`."""


_Loader.add_constructor("!reset", lambda loader, node: None)


def _load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load((_ROOT / name).read_text(), Loader=_Loader)
    return loaded


def _services() -> list[tuple[str, dict[str, Any]]]:
    return list(_load("docker-compose.yml")["services"].items())


def test_the_services_are_the_roles_of_serve_and_redis() -> None:
    assert [name for name, _ in _services()] == ["redis", "server", "intake", "worker"]


@pytest.mark.parametrize(("name", "service"), _services())
def test_each_service_is_checked_and_its_image_has_a_tag(
    name: str, service: dict[str, Any]
) -> None:
    assert service["healthcheck"]["test"]
    assert re.fullmatch(r"[a-z/-]+:[\d.]+", service["image"])
    if name != "redis":
        assert service["depends_on"]["redis"]["condition"] == "service_healthy"
        assert (_ROOT / service["build"]["dockerfile"]).is_file()
        assert "state:/state" in service["volumes"]


def test_every_variable_is_a_real_setting_and_none_is_a_secret() -> None:
    for _, service in _services():
        environment = {
            name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value)
            for name, value in service.get("environment", {}).items()
        }
        assert all(name.startswith("FREIGHT_") for name in environment)
        Settings.from_environment(environment)  # raises on a name that it does not know


# What the containers set themselves, and what means nothing in them (docker-compose.yml).
_OWN = {
    *("STATE_DIR", "REDIS_URL", "HOST", "PORT", "MODEL", "DATABASE_URL", "SPILL_DIR"),
    *("ALLOW_KEYLESS", "API_KEY"),
}


@pytest.mark.parametrize("role", ["server", "intake", "worker"])
def test_every_setting_is_passed_on_by_its_name_but_for_the_containers_own(role: str) -> None:
    environment = dict(_services())[role]["environment"]
    passed = {name for name, value in environment.items() if value == f"${{{name}:-}}"}
    settings = {field.name.upper() for field in dataclasses.fields(Settings)}
    assert passed == {f"FREIGHT_{name}" for name in settings - _OWN}
    assert set(environment) - passed <= {f"FREIGHT_{name}" for name in _OWN}


def test_the_server_may_go_without_a_key_only_where_it_is_published_on_loopback() -> None:
    services = dict(_services())
    assert services["server"]["environment"]["FREIGHT_ALLOW_KEYLESS"] == "true"
    assert [port.split(":")[0] for port in services["server"]["ports"]] == ["127.0.0.1"]
    image = (_ROOT / "docker" / "server.Dockerfile").read_text()
    assert "FREIGHT_HOST=0.0.0.0" in image
    assert "ALLOW_KEYLESS" not in image  # by itself it is refused until there is a key


def test_redis_keeps_what_it_acknowledged() -> None:
    redis = dict(_services())["redis"]
    command = " ".join(redis["command"])
    assert redis["image"].startswith("valkey/valkey:")
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert redis["volumes"] == ["valkey:/data"]


def test_the_worker_reserves_a_gpu_and_the_override_lets_it_go() -> None:
    worker = dict(_services())["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert _load("docker-compose.cpu.yml")["services"] == {"worker": {"deploy": None}}


def test_models_are_mounted_read_only_and_volumes_declared() -> None:
    compose = _load("docker-compose.yml")
    for name in ("intake", "worker"):
        assert compose["services"][name]["volumes"][1].endswith(":/models:ro")
    assert set(compose["volumes"]) == {"state", "valkey"}


@pytest.mark.parametrize("role", ["server", "worker"])
def test_dockerfiles_copy_only_what_is_there_and_set_only_settings(role: str) -> None:
    text = (_ROOT / "docker" / f"{role}.Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((_ROOT / path).exists() for path in line.split())
    Settings.from_environment(dict(re.findall(r"(FREIGHT_\w+)=(\S+)", text)))
    assert f"requirements/{role}.lock" in text
    assert ("pip install --no-cache-dir torch" in text) is (role == "worker")
