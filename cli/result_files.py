"""Where results lie, and files that grow by one result at a time and survive being cut short."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cli.errors import StartError
from jobs.line import Outcome, ResultRecord


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResultPaths:
    output: Path
    errors: Path

    @classmethod
    def beside(cls, file: Path, out: Path | None = None) -> "ResultPaths":
        """`a.jsonl` gives `a.output.jsonl` and `a.errors.jsonl`; a named output its own errors.

        Raises StartError if one of them is `file` itself, which would be lost.
        """
        paths = cls(
            output=out or file.with_suffix(".output.jsonl"),
            errors=(out or file).with_suffix(".errors.jsonl"),
        )
        for path in (paths.output, paths.errors):
            if path.resolve() == file.resolve():
                raise StartError(f"results would go to {path}, over the requests; name another")
        return paths


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResultFiles:
    """Each result is in its file, whole and flushed, before `append` returns."""

    output: BinaryIO
    errors: BinaryIO
    answered: frozenset[str]
    """The custom ids that the output file held when it was opened."""

    def append(self, result: ResultRecord) -> None:
        file = self.output if result.outcome is Outcome.COMPLETED else self.errors
        file.write(result.row.encode() + b"\n")
        file.flush()


@contextlib.contextmanager
def open_results(paths: ResultPaths, *, resume: bool) -> Iterator[ResultFiles]:
    """Open for appending. Lines that failed are tried again, so errors always start anew.

    Raises StartError if there is an output and it is not to be resumed, or it cannot be.
    """
    if paths.output.exists() and not resume:
        raise StartError(
            f"{paths.output} is there already; --resume goes on where it ends, "
            "or remove it to start anew"
        )
    paths.output.parent.mkdir(parents=True, exist_ok=True)
    answered = _answered(paths.output) if paths.output.exists() else frozenset()
    with paths.output.open("ab") as output, paths.errors.open("wb") as errors:
        yield ResultFiles(output=output, errors=errors, answered=answered)
    if paths.errors.stat().st_size == 0:
        paths.errors.unlink()


def _answered(path: Path) -> frozenset[str]:
    """The custom ids of the whole lines; a last line that was torn is cut off."""
    found = set()
    with path.open("rb+") as file:
        end_bytes = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                found.add(str(json.loads(line)["custom_id"]))
            except (ValueError, KeyError, TypeError):
                raise StartError(f"cannot resume: {path} line {number} is no result") from None
            end_bytes += len(line)
        os.truncate(file.fileno(), end_bytes)
    return frozenset(found)
