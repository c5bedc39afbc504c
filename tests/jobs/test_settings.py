"""Settings: every variable is read, checked and passed on to children unchanged."""

import dataclasses
from pathlib import Path

import pytest

from jobs.errors import SettingsError
from jobs.settings import ComputeDtype, Settings, parse_bytes


def test_an_empty_environment_has_defaults_below_the_home_folder() -> None:
    settings = Settings.from_environment({})
    assert settings.state_dir == Path.home() / ".local" / "state" / "freight"
    assert settings.ledger_url == f"sqlite:///{settings.state_dir}/ledger.db"
    assert (settings.max_file_bytes, settings.max_batch_lines) == (209_715_200, 50_000)


def test_variables_of_every_kind_are_read() -> None:
    settings = Settings.from_environment(
        {
            "FREIGHT_STATE_DIR": "/s",
            "FREIGHT_PORT": "9",
            "FREIGHT_MAX_FILE_BYTES": "1.5GiB",
            "FREIGHT_ACCUMULATION_WINDOW_S": "0.25",
            "FREIGHT_REDIS_URL": "",
            "FREIGHT_COMPUTE_DTYPE": "bfloat16",
            "FREIGHT_DATABASE_URL": "postgresql://x",
            "FREIGHT_ALLOW_KEYLESS": "TRUE",
            "PATH": "/bin",
        }
    )
    assert (settings.state_dir, settings.port) == (Path("/s"), 9)
    assert settings.max_file_bytes == 3 * 2**29
    assert settings.accumulation_window_s == 0.25
    assert settings.redis_url is None
    assert settings.compute_dtype is ComputeDtype.BFLOAT16
    assert settings.ledger_url == "postgresql://x"
    assert settings.allow_keyless


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FREIGHT_PORT", "many"),
        ("FREIGHT_MAX_FILE_BYTES", "12 parsecs"),
        ("FREIGHT_MAX_FILE_BYTES", "-1"),
        ("FREIGHT_PROT", "8000"),
        ("FREIGHT_COMPUTE_DTYPE", "bf16"),
        ("FREIGHT_ALLOW_KEYLESS", "perhaps"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        Settings.from_environment({variable: value})


def test_a_dtype_that_is_none_is_answered_with_those_there_are() -> None:
    with pytest.raises(SettingsError, match="'bf16' is not one of float32, bfloat16, float16"):
        Settings.from_environment({"FREIGHT_COMPUTE_DTYPE": "bf16"})


def test_children_read_back_what_the_parent_had() -> None:
    settings = Settings(
        state_dir=Path("/s"),
        redis_url="redis://h",
        gpu_memory_bytes=7,
        stall_s=1.5,
        spill_dir=None,
        compute_dtype=ComputeDtype.FLOAT16,
        allow_keyless=True,
    )
    assert Settings.from_environment(settings.to_environment()) == settings


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings(state_dir=Path()).port = 1  # type: ignore[misc]  # that it is frozen is the test


@pytest.mark.parametrize(
    ("text", "size"),
    [("1536", 1536), ("200MB", 200_000_000), ("200 MiB", 209_715_200), ("1.5kB", None), ("", None)],
)
def test_sizes_know_decimal_from_binary(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="is not a size"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == size
