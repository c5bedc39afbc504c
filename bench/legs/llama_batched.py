"""The leg that is llama.cpp's batched benchmark: equal lengths, one batch, random tokens of its own.

With `shared_tokens` of the options two runs make the job: the shared beginning computed once with
all rows' decoding after it, and the rows' own parts of the prompts. llama.cpp gets the sum of what
it is best at, though no program of it does both.
"""

import dataclasses
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

from bench.legs.job import Job, Result, children_read_bytes, emit, read_bytes, this_job

_ROW: Final = re.compile(rb"^\|\s*\d+\s*\|\s*\d+\s*\|")
_HEADER: Final = re.compile(rb"^\|\s*PP\s*\|")
_UBATCH_TOKENS: Final = 512
_TRIES: Final = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One line of the program's table; `read_bytes` exclude the loading."""

    prompt_s: float
    decode_s: float
    load_s: float
    read_bytes: int


def bench(job: Job, *, prompt_tokens: int, output_tokens: int, is_shared: bool) -> Run:
    """Raises RuntimeError with the program's last words if it never prints its row.

    Its log loses a line now and then, above all in runs of a second: the run is then made anew.
    """
    rows = len(job.requests)
    # Cells for every row's own tokens, a prompt shared or not, and some to spare.
    context = rows * (prompt_tokens + output_tokens) + rows + _UBATCH_TOKENS
    command = [
        *(job.options["program"], "-m", job.options["checkpoint"], "-t", str(job.threads)),
        *("-tb", str(job.threads), "-c", str(context), "-b", str(max(rows, 2048))),
        *("-ub", str(max(rows, _UBATCH_TOKENS)), "-npp", str(prompt_tokens)),
        *("-ntg", str(output_tokens), "-npl", str(rows), "-lm", "mmap", "--no-repack", "-kvu"),
        *(["-pps"] if is_shared else []),
    ]
    last_words = ""
    for _ in range(_TRIES):
        run, last_words = _watch(command)
        if run is not None:
            return run
    raise RuntimeError(f"{command[0]} printed no row in {_TRIES} runs: {last_words}")


def _watch(command: Sequence[str]) -> tuple[Run | None, str]:
    """The row, if it is printed, and the last words."""
    started_s = time.perf_counter()
    loaded_s = started_s
    loaded_bytes = 0
    said: list[bytes] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if _HEADER.match(line):
                loaded_s, loaded_bytes = time.perf_counter(), read_bytes(process.pid)
            if _ROW.match(line):
                cells = line.split(b"|")
                run = Run(
                    prompt_s=float(cells[5]),
                    decode_s=float(cells[7]),
                    load_s=loaded_s - started_s,
                    read_bytes=read_bytes(process.pid) - loaded_bytes,
                )
                process.kill()  # nothing but a summary would follow
                return run, ""
    return None, b"".join(said[-8:]).decode(errors="replace")


def main() -> int:
    job = this_job()
    shared_tokens = job.options["shared_tokens"]
    first = job.requests[0]
    prompt_tokens = len(first.token_ids)
    if shared_tokens:
        runs = [
            bench(
                job,
                prompt_tokens=shared_tokens,
                output_tokens=first.max_tokens,
                is_shared=True,
            ),
            bench(
                job, prompt_tokens=prompt_tokens - shared_tokens, output_tokens=1, is_shared=False
            ),
        ]
        seconds = runs[0].prompt_s + runs[0].decode_s + runs[1].prompt_s
    else:
        runs = [
            bench(job, prompt_tokens=prompt_tokens, output_tokens=first.max_tokens, is_shared=False)
        ]
        seconds = runs[0].prompt_s + runs[0].decode_s
    rows = len(job.requests)
    emit(
        Result(
            seconds=seconds,
            load_s=sum(run.load_s for run in runs),
            output_tokens=rows * first.max_tokens,
            total_tokens=rows * (prompt_tokens + first.max_tokens),
            read_bytes=sum(run.read_bytes for run in runs),
            detail={
                "runs": [dataclasses.asdict(run) for run in runs],
                "read_bytes_with_loading": children_read_bytes(),
            },
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
