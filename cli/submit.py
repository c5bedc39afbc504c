"""`freight submit`: send a file to a running server, follow the batch, fetch its results."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import progress_bar, say
from cli.result_files import ResultPaths
from jobs.settings import Settings

if TYPE_CHECKING:  # the client is slow to import, and only commands that talk need it
    from openai import OpenAI
    from openai.types import Batch

_MOST_FAULTS_SHOWN = 20


def submit(
    file: Annotated[Path, typer.Argument(help="Requests, one JSON object a line.")],
    url: Annotated[str, typer.Option(help="A running server.")] = "http://127.0.0.1:8000",
    out: Annotated[
        Path | None, typer.Option(help="Output file; errors go beside it. [FILE.output.jsonl]")
    ] = None,
) -> None:
    """Send FILE to a server as a batch, follow it, download the results. 0 if all succeeded.

    Where the server asks for a key, FREIGHT_API_KEY is shown to it.
    """
    import openai  # noqa: PLC0415 (slow to import)

    from cli.client import connect  # noqa: PLC0415

    results = ResultPaths.beside(file, out)
    try:
        with connect(url, api_key=Settings.from_environment().api_key) as client:
            complete = submit_and_fetch(client, file, results)
    except openai.APIConnectionError:
        say(f"error: nothing answers at {url}; start it with `freight serve`, or give --url")
        raise typer.Exit(1) from None
    except openai.APIStatusError as error:
        say(f"error: {error.message}")
        raise typer.Exit(1) from None
    if not complete:
        raise typer.Exit(1)


def submit_and_fetch(
    client: "OpenAI", file: Path, results: ResultPaths, *, check: Callable[[], None] | None = None
) -> bool:
    """Whether every line was answered. `check` is called now and then while the batch runs."""
    from cli.client import follow, send  # noqa: PLC0415 (slow to import)

    batch = send(client, file)
    say(f"batch {batch.id}: client.batches.retrieve and client.batches.cancel take this id")
    meter = _Meter()
    with progress_bar() as bar:
        task = bar.add_task(batch.status, total=None, rate="")
        for state in follow(client, batch):
            if check is not None:
                check()
            batch = state
            done, total = _counts(batch)
            bar.update(
                task,
                description=batch.status,
                completed=done,
                total=total or None,
                rate=meter.rate(batch),
            )
    _fetch_results(client, batch, results)
    return _conclude(batch)


class _Meter:
    """Output tokens a second since the first one was seen; empty where usage is not told."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def rate(self, batch: "Batch") -> str:
        num_tokens = batch.usage.output_tokens if batch.usage else 0
        if not num_tokens:
            return ""
        now_s = time.monotonic()
        if self._first is None:
            self._first = (now_s, num_tokens)
        first_s, first_tokens = self._first
        if now_s == first_s:
            return f"{num_tokens} tokens"
        return f"{num_tokens} tokens, {(num_tokens - first_tokens) / (now_s - first_s):.1f}/s"


def _counts(batch: "Batch") -> tuple[int, int]:
    counts = batch.request_counts
    return (counts.completed + counts.failed, counts.total) if counts else (0, 0)


def _fetch_results(client: "OpenAI", batch: "Batch", results: ResultPaths) -> None:
    from cli.client import fetch  # noqa: PLC0415 (slow to import)

    found = ((batch.output_file_id, results.output), (batch.error_file_id, results.errors))
    for file_id, path in found:
        if file_id:
            fetch(client, file_id, path)
            say(f"wrote {path}")
    if not (batch.output_file_id or batch.error_file_id):
        return  # an earlier batch's results stay until there are others in their place
    for file_id, path in found:
        if not file_id:
            path.unlink(missing_ok=True)  # what an earlier batch left is not this one's


def _conclude(batch: "Batch") -> bool:
    done, total = _counts(batch)
    failed = batch.request_counts.failed if batch.request_counts else 0
    for fault in (batch.errors.data or [] if batch.errors else [])[:_MOST_FAULTS_SHOWN]:
        where = f"line {fault.line}: " if fault.line else ""
        say(f"{where}{fault.message} ({fault.code})")
    answered = done - failed
    say(f"{batch.status}: {answered} of {total} lines answered")
    return batch.status == "completed" and answered == total
