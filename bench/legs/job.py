"""What a leg is told and what it answers: a job file in, result lines out. Knows no engine.

A leg is one engine answering one job in a process of its own, so that a memory cgroup and the
kernel's counters are about it alone. It may answer several times: the last line holds.
"""

import dataclasses
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from bench.workloads import Request

RESULT: Final = "RESULT "
_SECTOR_BYTES: Final = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`options` are the leg's own. With `ignore_eos` each request gets exactly its tokens."""

    requests: tuple[Request, ...]
    threads: int
    ignore_eos: bool
    options: dict[str, Any]

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(dataclasses.asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        fields = json.loads(path.read_text())
        fields["requests"] = tuple(map(Request.from_json, fields["requests"]))
        return cls(**fields)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was done so far. Loading and the warm-up are in `load_s`, never in `seconds`.

    Tokens count up to each request's own limit; `answers` may be empty where an engine tells none.
    """

    seconds: float
    load_s: float
    output_tokens: int
    total_tokens: int
    read_bytes: int
    is_whole: bool = True
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)
    answers: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, output: str) -> "tuple[Result, ...]":
        """The results in a leg's output, whatever else its engine printed."""
        lines = (line for line in output.splitlines() if line.startswith(RESULT))
        return tuple(cls(**result_fields(line)) for line in lines)


def result_fields(line: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(line.removeprefix(RESULT))
    return fields


def this_job() -> Job:
    return Job.read(Path(sys.argv[1]))


def emit(result: Result) -> None:
    print(RESULT + json.dumps(dataclasses.asdict(result)), flush=True)


def total_tokens(requests: Sequence[Request], answers: Mapping[str, Sequence[int]]) -> int:
    """Prompt and answered tokens of the requests that have an answer."""
    return sum(len(r.token_ids) + len(answers[r.key]) for r in requests if r.key in answers)


def read_bytes(process: int | None = None) -> int:
    """Bytes that a process, by default this one, had read from block devices so far."""
    path = Path("/proc") / ("self" if process is None else str(process)) / "io"
    fields = dict(line.split(": ") for line in path.read_text().splitlines())
    return int(fields["read_bytes"])


def children_read_bytes() -> int:
    """The same, of the children that have ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock * _SECTOR_BYTES
