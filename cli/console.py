"""How the command line speaks to a person: on stderr, unwrapped, nothing in it taken as markup."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def progress_console() -> Console:
    return Console(stderr=True, soft_wrap=True, highlight=False)


def say(text: str) -> None:
    progress_console().print(text, markup=False)


def show(text: str) -> None:
    """A result, on stdout."""
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


def progress_bar() -> Progress:
    """Lines done of all lines; its tasks carry the field `rate`, a text."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=progress_console(),
    )
