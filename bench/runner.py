"""Runs one leg: a process on given cores, in a memory cgroup if there is a limit, until a deadline.

Knows that legs are modules that read a job file and print result lines; not what engines they are.
"""

import contextlib
import dataclasses
import enum
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bench.legs.job import RESULT, Job, Result, result_fields
from bench.memory_group import MemoryGroup, memory_group
from bench.peers import ROOT

_DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")
# The shell joins the group before it becomes the leg: not one page is counted elsewhere.
_JOIN: Final = 'echo $$ > "$0" && exec "$@"'


class Ending(enum.StrEnum):
    """How a leg came to its end."""

    DONE = "done"
    OUT_OF_MEMORY = "out of memory"
    CUT_SHORT = "cut short"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """One engine with its setting. `module` is a name in bench/legs."""

    engine: str
    setting: str
    module: str
    options: dict[str, Any]
    import_path: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.engine}, {self.setting}" if self.setting else self.engine


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a leg. A leg cut short has the result of the part that it finished, or none."""

    leg: Leg
    ending: Ending
    results: tuple[Result, ...]
    peak_bytes: int | None
    asked_tokens: int
    deadline_s: float
    words: str
    """The last that a leg wrote before it failed."""

    @property
    def result(self) -> Result | None:
        return self.results[-1] if self.results else None

    @property
    def last_words(self) -> str:
        lines = self.words.strip().splitlines()
        return lines[-1] if lines else "no words"

    @property
    def output_tokens_per_s(self) -> float | None:
        found = self.result
        return found.output_tokens / found.seconds if found and found.seconds else None

    @property
    def bound_tokens_per_s(self) -> float | None:
        """What a leg that was cut short with nothing answered has stayed below, its loading aside."""
        if self.ending is not Ending.CUT_SHORT or self.output_tokens_per_s is not None:
            return None
        load_s = self.result.load_s if self.result else 0.0
        return self.asked_tokens / (self.deadline_s - load_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where legs run. `limit_bytes` None: no memory limit."""

    cpus: tuple[int, ...]
    deadline_s: float
    limit_bytes: int | None = None

    def run(self, leg: Leg, job: Job) -> Outcome:
        """Raises NoMemoryGroupError where the limit cannot be set."""
        drop_caches()
        asked_tokens = sum(request.max_tokens for request in job.requests)
        with tempfile.TemporaryDirectory() as folder:
            file = dataclasses.replace(job, options=leg.options).write(Path(folder) / "job.json")
            with contextlib.ExitStack() as stack:
                group = None
                if self.limit_bytes is not None:
                    group = stack.enter_context(memory_group(self.limit_bytes))
                outcome = self._run(leg, file, group, asked_tokens)
        print(f"  {leg.name}: {_summary(outcome)}", file=sys.stderr, flush=True)
        return outcome

    def measure(self, job: Job, options: dict[str, Any]) -> dict[str, Any]:
        """What the leg of the ceilings found. Raises RuntimeError with its words if it failed."""
        leg = Leg(engine="ceilings", setting="", module="ceilings", options=options)
        with tempfile.TemporaryDirectory() as folder:
            file = dataclasses.replace(job, options=options).write(Path(folder) / "job.json")
            done = subprocess.run(
                self._command(leg, file, None),
                env=self._environment(leg),
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
        lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
        if not lines:
            raise RuntimeError(f"the ceilings were not measured: {done.stderr[-2000:]}")
        return result_fields(lines[-1])

    def _run(self, leg: Leg, file: Path, group: MemoryGroup | None, asked_tokens: int) -> Outcome:
        folder = file.parent
        output, errors = folder / "output", folder / "errors"
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                self._command(leg, file, group),
                env=self._environment(leg),
                cwd=ROOT,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            is_late = False
            try:
                process.wait(self.deadline_s)
            except subprocess.TimeoutExpired:
                is_late = True
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what the leg has started
                process.wait()
        was_killed = group is not None and group.num_killed > 0
        return Outcome(
            leg=leg,
            ending=_ending(process.returncode, is_late=is_late, was_killed=was_killed),
            results=Result.parse(output.read_text(errors="replace")),
            peak_bytes=group.peak_bytes if group else None,
            asked_tokens=asked_tokens,
            deadline_s=self.deadline_s,
            words=errors.read_text(errors="replace")[-1500:],
        )

    def _command(self, leg: Leg, file: Path, group: MemoryGroup | None) -> list[str]:
        joined = ["sh", "-c", _JOIN, str(group.processes)] if group else []
        cpus = ",".join(map(str, self.cpus))
        module = f"bench.legs.{leg.module}"
        return [*joined, "taskset", "-c", cpus, sys.executable, "-m", module, str(file)]

    def _environment(self, leg: Leg) -> Mapping[str, str]:
        threads = str(len(self.cpus))
        path = os.pathsep.join(map(str, (ROOT, *leg.import_path)))
        return os.environ | {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def _ending(returncode: int, *, is_late: bool, was_killed: bool) -> Ending:
    if was_killed:
        return Ending.OUT_OF_MEMORY
    if is_late:
        return Ending.CUT_SHORT
    return Ending.DONE if returncode == 0 else Ending.FAILED


def _summary(outcome: Outcome) -> str:
    rate = outcome.output_tokens_per_s
    if outcome.ending is Ending.FAILED:
        return f"failed: {outcome.last_words}"
    if outcome.result is None or rate is None:
        bound = outcome.bound_tokens_per_s
        return f"{outcome.ending}, below {bound:.2f} output tok/s" if bound else str(outcome.ending)
    return f"{outcome.ending}, {outcome.result.seconds:.1f} s, {rate:.2f} output tok/s"


def drop_caches() -> bool:
    """Whether the page cache was given back, so that no leg finds another's pages."""
    os.sync()
    try:
        _DROP_CACHES.write_text("1")
    except OSError:
        return False
    return True


def usable_cpus(count: int) -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0))[:count])
