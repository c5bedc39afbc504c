"""`freight keys`: API keys of this installation, made, listed and revoked in its ledger."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cli.console import say, show
from jobs.settings import Settings, parse_bytes
from jobs.tenant import DEFAULT_TENANT, Key, Limits, checked_name, checked_tenant

if TYPE_CHECKING:  # sqlalchemy is slow to import
    from jobs.ledger.keys import KeyRecords

keys: Final = typer.Typer(
    no_args_is_help=True, help="API keys: once there is one, the server answers nobody without."
)


def _argument(check: Callable[[str], str]) -> Callable[[str], str]:
    def checked(text: str) -> str:
        try:
            return check(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return checked


@keys.command()
def create(
    name: Annotated[
        str, typer.Argument(callback=_argument(checked_name), help="What the key is for.")
    ],
    *,
    tenant: Annotated[
        str,
        typer.Option(
            callback=_argument(checked_tenant),
            help="Whose it is: the keys of a tenant see the same files and batches, no others.",
        ),
    ] = DEFAULT_TENANT,
    stored_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes, metavar="SIZE", help="Most that the tenant may store, say 20GiB."
        ),
    ] = None,
    batches_per_hour: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most batches of the tenant within an hour."),
    ] = None,
    enqueued_lines: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Most lines of the tenant before the engine; others wait."
        ),
    ] = None,
) -> None:
    """Make a key. Its secret goes to stdout, once: it is kept nowhere."""
    limits = Limits(
        stored_bytes=stored_bytes,
        batches_per_hour=batches_per_hour,
        enqueued_lines=enqueued_lines,
    )
    with _records() as records:
        key, secret = records.create(name=name, tenant=tenant, limits=limits)
    say(f"{key.id} for tenant {key.tenant}; its secret is told this once:")
    typer.echo(secret)


@keys.command(name="list")
def list_keys() -> None:
    """Show all keys; their secrets are not known."""
    with _records() as records:
        found = records.all()
    if not found:
        say("no API key was made yet: the server asks for none, and listens on loopback only")
        return
    show(_text(found))


@keys.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="As listed.")]) -> None:
    """Make a key worthless at once. What was made with it stays its tenant's."""
    with _records() as records:
        was_good = records.revoke(key_id)
        is_last = all(key.revoked_at is not None for key in records.all())
    say(f"{key_id} is revoked" if was_good else f"{key_id} was revoked before")
    if is_last:
        say("no key is left: until another is made, the server answers nobody")


@contextlib.contextmanager
def _records() -> "Iterator[KeyRecords]":
    """Of the ledger that the server of these settings uses."""
    from jobs.ledger.ledger import Ledger  # noqa: PLC0415 (sqlalchemy is slow to import)

    with contextlib.closing(Ledger.open(Settings.from_environment().ledger_url)) as ledger:
        yield ledger.keys


def _text(found: Sequence[Key]) -> str:
    """A line for each, the columns aligned; names are any text and come last."""
    head = ("ID", "TENANT", "MADE (UTC)", "STATE", "BYTES", "BATCHES/H", "LINES", "NAME")
    rows = [head, *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _cells(key: Key) -> tuple[str, ...]:
    limits = (key.limits.stored_bytes, key.limits.batches_per_hour, key.limits.enqueued_lines)
    return (
        key.id,
        key.tenant,
        datetime.fromtimestamp(key.created_at, UTC).strftime("%Y-%m-%d %H:%M"),
        "good" if key.revoked_at is None else "revoked",
        *("-" if limit is None else str(limit) for limit in limits),
        key.name,
    )
