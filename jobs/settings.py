"""The `FREIGHT_*` settings, read once and frozen; nothing else reads the environment."""

import dataclasses
import enum
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from jobs.errors import SettingsError
from jobs.networks import Networks
from jobs.webhook import check_secret, check_url

_UNITS: Final[Mapping[str, int]] = types.MappingProxyType(
    {
        "": 1,
        "B": 1,
        **{f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("KMGT", start=1)},
        **{f"{letter}iB": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)},
    }
)


class ComputeDtype(enum.StrEnum):
    """What a model can be computed in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @classmethod
    def _missing_(cls, value: object) -> "ComputeDtype":
        raise ValueError(f"{value!r} is not one of {', '.join(cls)}")


def parse_bytes(text: str) -> int:
    """`"1536"`, `"1.5GiB"` or `"200 MB"` in bytes. GiB is 2**30, GB is 10**9. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write 1536, 200MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_flag(text: str) -> bool:
    """`"true"` or `"1"`, `"false"` or `"0"`, in letters of any size. Raises ValueError."""
    flags = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in flags:
        raise ValueError("write true or false")
    return flags[text.lower()]


def _default_state_dir(environment: Mapping[str, str]) -> Path:
    base = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "freight"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of every role. The environment name is `FREIGHT_` and the field in capitals."""

    state_dir: Path
    """Everything Freight keeps: ledger, files, embedded Valkey, packed weights, models."""
    database_url: str | None = None
    """The ledger. None: SQLite in the state folder. PostgreSQL by URL."""
    redis_url: str | None = None
    """The doorbell. None: `freight serve` starts an embedded Valkey on loopback."""
    host: str = "127.0.0.1"
    port: int = 8000
    allow_keyless: bool = False
    """Whether the server may listen beyond loopback while there is no API key."""
    api_key: str | None = dataclasses.field(default=None, repr=False)
    """What `freight submit` shows the server. No role needs it."""

    model: str | None = None
    """A checkpoint: safetensors folder, GGUF file, or a name under `<state_dir>/models`."""
    model_id: str | None = None
    """The name clients ask for. None: derived from the checkpoint's file name."""

    max_file_bytes: int = 200 * 2**20
    max_batch_lines: int = 50_000
    max_line_bytes: int = 10 * 2**20
    client_stall_s: float = 60.0
    """How long a client may send nothing of its request, or take nothing of its answer."""

    rider_wait_s: float = 590.0
    """How long a request outside batches waits for its answer: a little less than clients do."""
    max_riders: int = 1_000
    """Requests outside batches that may wait at once."""
    webhook_url: str | None = None
    """Who is told of each batch's end. None: only those whom a batch names itself."""
    webhook_secret: str | None = dataclasses.field(default=None, repr=False)
    """What webhooks are signed with, `whsec_` and base64; a batch may bring one of its own."""
    webhook_networks: Networks = dataclasses.field(default_factory=Networks)
    """Networks that webhooks may reach beside the public ones, as `10.0.0.0/8,127.0.0.0/8`."""

    accumulation_window_s: float = 1.0
    """How long the worker waits for a full block after the first waiting line."""
    shard_lines: int = 32
    shards_ahead: int = 16
    """Shards of one batch on the queue at once: batches take turns beyond it."""
    lease_s: int = 15
    """How long a worker may be silent before its shards go to another."""
    reconcile_s: float = 5.0
    """How often lost doorbells are rung again, expired batches settled and due webhooks sent."""
    stall_s: float = 600.0
    """How long a sweep may stand still, not one step further, before the worker is treated as dead."""

    gpu_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    disk_space_bytes: int | None = None
    spill_dir: Path | None = None
    profile: Path | None = None
    """A file that `freight profile --out` wrote. None: this machine's own, measured if need be."""
    policy: Path | None = None
    """A policy that `freight plan --json` wrote, to be carried out as it is. None: planned."""
    compute_dtype: ComputeDtype | None = None
    """None: float32 on a CPU, the checkpoint's own on a GPU."""
    block_rows: int | None = None
    """Rows of the block. None: the policy's own choice."""
    sweep_tokens: int | None = None
    """Prompt tokens that one sweep may carry beside the decoding rows. None: the policy's own."""
    trace_file: Path | None = None
    """A timeline of the engine for Chrome or Perfetto, written over at each start of a worker."""
    call_log: Path | None = None
    """A JSON line for each call and sweep of the engine, appended to."""

    @property
    def ledger_url(self) -> str:
        return self.database_url or f"sqlite:///{self.state_dir / 'ledger.db'}"

    @property
    def files_dir(self) -> Path:
        return self.state_dir / "files"

    @property
    def models_dir(self) -> Path:
        return self.state_dir / "models"

    @property
    def weights_dir(self) -> Path:
        """Where packed weights and other spilled bytes lie."""
        return self.spill_dir or self.state_dir / "spill"

    @property
    def profile_file(self) -> Path:
        """What this machine was measured to be."""
        return self.state_dir / "profile.json"

    @property
    def corrections_file(self) -> Path:
        """What runs have taught about the profile."""
        return self.state_dir / "corrections.json"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Settings":
        """Read `FREIGHT_*`. Raises SettingsError naming the variable, its value and what fits."""
        source = dict(os.environ if environment is None else environment)  # noqa: TID251
        values: dict[str, Any] = {"state_dir": _default_state_dir(source)}
        readers = {f"FREIGHT_{name.upper()}": name for name in _READERS}
        for variable, text in source.items():
            if not variable.startswith("FREIGHT_") or text == "":
                continue
            if variable not in readers:
                raise SettingsError(f"{variable} is not a setting of Freight")
            name = readers[variable]
            try:
                values[name] = _READERS[name](text)
            except ValueError as error:
                told = variable if name in _NOT_QUOTED else f"{variable}={text!r}"
                raise SettingsError(f"{told}: {error}") from error
        if "webhook_url" in values and "webhook_secret" not in values:
            raise SettingsError("FREIGHT_WEBHOOK_URL needs FREIGHT_WEBHOOK_SECRET to sign with")
        return cls(**values)

    def to_environment(self) -> dict[str, str]:
        """The settings as variables, for child processes of the same state folder."""
        return {
            f"FREIGHT_{field.name.upper()}": str(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }


def _webhook_url(text: str) -> str:
    check_url(text)
    return text


def _webhook_secret(text: str) -> str:
    check_secret(text)
    return text


_CHECKED: Final[Mapping[str, Callable[[str], object]]] = types.MappingProxyType(
    {"webhook_url": _webhook_url, "webhook_secret": _webhook_secret}
)
_NOT_QUOTED: Final = ("webhook_secret",)


def _reader(name: str, annotation: object) -> Callable[[str], object]:
    if name in _CHECKED:
        return _CHECKED[name]
    if name.endswith("_bytes"):
        return parse_bytes
    if annotation is bool:
        return parse_flag
    for kind in (int, float, Path, ComputeDtype, Networks, str):
        if annotation is kind or kind in typing.get_args(annotation):
            return kind
    raise AssertionError(f"no reader for {name}: {annotation}")


_READERS: Final[Mapping[str, Callable[[str], object]]] = types.MappingProxyType(
    {name: _reader(name, kind) for name, kind in typing.get_type_hints(Settings).items()}
)
