"""Which model is served: its files, its name, its context; and loading tokenizer and engine.

The intake process must not pay for the engine, so both are imported only when asked for.
"""

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from engine.config import Completion, Prompt
from jobs.errors import SettingsError
from jobs.ledger.ledger import Model
from jobs.line_group import WaitingBatch
from jobs.settings import Settings
from worker.context_length import max_context_tokens
from worker.render import Renderer, TextTokenizer


class ReportLine(Protocol):
    """One link or unit of the machine; `unit` is empty where only time is told."""

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def amount(self) -> int: ...
    @property
    def busy_s(self) -> float: ...
    @property
    def per_s(self) -> float | None: ...
    @property
    def ceiling_per_s(self) -> float | None: ...
    @property
    def share(self) -> float | None: ...


class EngineReport(Protocol):
    @property
    def generated_tokens(self) -> int: ...
    def since(self, earlier: Self) -> Self: ...
    def lines(self) -> Sequence[ReportLine]: ...
    def as_dict(self) -> dict[str, Any]: ...


class Engine(Protocol):
    """What the worker needs of `engine.engine.Engine`."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def max_context_tokens(self) -> int: ...
    @property
    def block_rows(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    def check(self, prompt: Prompt) -> None: ...
    def submit(self, prompt: Prompt) -> None: ...
    def cancel(self, key: str) -> None: ...
    def sweep(self) -> list[Completion]: ...
    def report(self) -> EngineReport: ...
    def close(self) -> None: ...


class Replanner(Protocol):
    """What the worker needs of `worker.replanner.Replanner`."""

    @property
    def predicted_tokens_per_s(self) -> float | None: ...
    def consider(self, waiting: Sequence[WaitingBatch]) -> bool: ...
    def settle(self, report: Any) -> Mapping[str, Any] | None: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An engine ready to sweep, and who holds it to the plan; None: nobody plans."""

    engine: Engine
    replanner: Replanner | None = None


LoadEngine = Callable[[Settings, Sequence[WaitingBatch]], Loaded]
LoadTokenizer = Callable[[Path], TextTokenizer]


def resolve_model(settings: Settings) -> Path:
    """The checkpoint: a path, or a name under the models folder. Raises SettingsError."""
    if settings.model is None:
        raise SettingsError("FREIGHT_MODEL is not set: a checkpoint folder, a GGUF file or a name")
    for path in (Path(settings.model), settings.models_dir / settings.model):
        if path.exists():
            return path.resolve()
    raise SettingsError(
        f"FREIGHT_MODEL={settings.model!r}: no such file or folder, "
        f"and no such name under {settings.models_dir}"
    )


def served_model(settings: Settings) -> Model:
    """Raises SettingsError, or CheckpointError if the checkpoint does not tell its context."""
    path = resolve_model(settings)
    return Model(
        id=settings.model_id or (path.stem if path.is_file() else path.name),
        created_at=int(time.time()),
        max_context_tokens=max_context_tokens(path),
    )


def load_tokenizer(path: Path) -> TextTokenizer:
    """One that takes token ids only, for a checkpoint without tokenizer files."""
    tokenizer: TextTokenizer = importlib.import_module("engine.tokenizer").Tokenizer.load(path)
    return tokenizer


def load_renderer(settings: Settings, load: LoadTokenizer, *, max_context_tokens: int) -> Renderer:
    return Renderer(tokenizer=load(resolve_model(settings)), max_context_tokens=max_context_tokens)


def load_engine(settings: Settings, waiting: Sequence[WaitingBatch]) -> Loaded:
    """With its weights in place, as is best for what waits. Raises EngineError, SettingsError."""
    loaded: Loaded = importlib.import_module("worker.load").load(settings, waiting)
    return loaded
