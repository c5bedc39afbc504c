"""Options that several commands share, and how they go over the settings of the environment."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from jobs.settings import ComputeDtype, Settings, parse_bytes

ModelOption: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Safetensors folder, GGUF file, or a name in the models folder."),
]
GpuMemory: TypeAlias = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes, metavar="SIZE", help="Most GPU memory, say 20GiB; 0 forces the CPU."
    ),
]
HostMemory: TypeAlias = Annotated[
    int | None,
    typer.Option(parser=parse_bytes, metavar="SIZE", help="Most host memory, say 1.5GiB."),
]
DiskSpace: TypeAlias = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes, metavar="SIZE", help="Most disk for packed weights and spilled bytes."
    ),
]
SpillDir: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder for what does not fit in memory.")
]
ComputeIn: TypeAlias = Annotated[
    ComputeDtype | None,
    typer.Option(
        "--compute-dtype",
        help="Compute in it; else in float32 on a CPU, in the checkpoint's own on a GPU.",
    ),
]
PolicyFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="Carry out this policy of `freight plan --json` as it is; else one is planned.",
    ),
]
Trace: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write a timeline for chrome://tracing or Perfetto."),
]


def overridden(settings: Settings, **options: Any) -> Settings:
    """`settings` with every option that was given, each by its setting's name.

    Paths become absolute: roles may have another working folder. 0 is given, None is not.
    """
    given: dict[str, Any] = {
        name: value.absolute() if isinstance(value, Path) else value
        for name, value in options.items()
        if value is not None
    }
    return dataclasses.replace(settings, **given)
