"""Which checkpoint is meant: a path, a name in the models folder, or the demo model."""

from pathlib import Path
from typing import Final

from cli.errors import StartError
from jobs.settings import Settings

DEMO_MODEL: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_model(settings: Settings) -> Path:
    """The checkpoint that `settings.model` names. Raises StartError with what was looked at."""
    if settings.model is None:
        return _demo_model(settings)
    named = settings.models_dir / settings.model
    candidates = [Path(settings.model).expanduser(), named, named.with_name(f"{named.name}.gguf")]
    for candidate in candidates:
        if candidate.exists():
            return candidate.absolute()
    looked_at = ", ".join(str(candidate.absolute()) for candidate in candidates)
    raise StartError(
        f"there is no model {settings.model!r}: a safetensors folder or a GGUF file is needed; "
        f"looked at {looked_at}"
    )


def _demo_model(settings: Settings) -> Path:
    candidates = [settings.models_dir / DEMO_MODEL, Path.cwd() / ".models" / DEMO_MODEL]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise StartError(
        f"no model was named and the demo model is not there ({candidates[0]}, {candidates[1]}); "
        "name one with --model PATH or FREIGHT_MODEL, or fetch the demo model with `make model`"
    )
