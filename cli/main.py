"""The command line: the table of commands, and the one place where refusals become exit codes."""

import importlib.metadata
import os
import sys
from typing import Annotated, Final, NoReturn

import typer

from cli.console import say
from cli.demo import demo
from cli.errors import StartError
from cli.keys import keys
from cli.plan import plan
from cli.profile import profile
from cli.roles import healthy, intake, server, worker
from cli.run import run
from cli.serve import serve
from cli.submit import submit
from cli.supervisor import ERROR_PREFIX
from engine.errors import EngineError
from jobs.errors import FreightError, SettingsError

_COMMANDS: Final = (serve, run, submit, demo, profile, plan, server, intake, worker, healthy)
_GROUPS: Final = {"keys": keys}
# What would only fail again in the same way; the supervisor does not start such a child twice.
_WRONG_FROM_THE_START: Final = (SettingsError, StartError, EngineError)


def main() -> None:
    try:
        app()
    except (FreightError, EngineError) as error:
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    say(f"{ERROR_PREFIX}{error}")
    sys.exit(os.EX_CONFIG if isinstance(error, _WRONG_FROM_THE_START) else 1)


def _build() -> typer.Typer:
    built = typer.Typer(
        name="freight", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    built.callback()(_options)
    for command in _COMMANDS:
        built.command()(command)
    for name, group in _GROUPS.items():
        built.add_typer(group, name=name)
    return built


def _show_version(wanted: bool) -> None:  # noqa: FBT001 (Typer's signature)
    if wanted:
        typer.echo(f"freight {importlib.metadata.version('freight')}")
        raise typer.Exit


def _options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """An OpenAI-compatible batch-job server for one GPU box: throughput first, latency last."""


app: Final = _build()


if __name__ == "__main__":
    main()
