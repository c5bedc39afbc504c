"""`freight profile`: measure this machine once, show it, keep it for every plan to come."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import progress_bar, progress_console, say
from cli.options import SpillDir, overridden
from cli.profile_table import profile_table, profile_text
from jobs.settings import Settings

if TYPE_CHECKING:  # torch is loaded by the command alone
    from engine.planning.hardware import Hardware


def profile(
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Measure even if nothing changed.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Some seconds in place of nearly two minutes.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the profile here as well.")
    ] = None,
    spill_dir: SpillDir = None,
) -> None:
    """Measure this machine for the planner: nearly two minutes, best while nothing else runs."""
    from engine.planning.records import write_text  # noqa: PLC0415 (torch is slow to import)

    settings = overridden(Settings.from_environment(), spill_dir=spill_dir)
    found = _measured(settings, force=force, quick=quick)
    if out is not None:
        write_text(out, found.to_json())
    say(profile_text(found))
    progress_console().print(profile_table(found))
    say(f"kept in {settings.profile_file}" + (f" and {out}" if out else ""))


def _measured(settings: Settings, *, force: bool, quick: bool) -> "Hardware":
    from engine.profiling.saved import measured_or_saved  # noqa: PLC0415 (see above)

    with progress_bar() as bar:
        task = bar.add_task("measuring", total=None, rate="")

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, rate=name)

        found = measured_or_saved(
            settings.profile_file,
            spill_dir=settings.weights_dir,
            is_quick=quick,
            force=force,
            progress=show,
        )
        bar.update(task, visible=bar.tasks[0].total is not None)
    return found
