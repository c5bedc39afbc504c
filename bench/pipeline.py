"""Lines a second through everything but the model: `python -m bench.pipeline [--lines 50000]`.

Server, intake and worker are processes of their own over a fresh ledger; the engine is a fake one
that costs nothing behind the real worker. One batch of chat lines goes from upload to download.
For each stage: wall time, lines a second, CPU seconds of each role; then the worker's CPU time a line
as the batch fills, and the roles' peak memory. Every line is looked for in the output file, once and
in its place, and in the worker's own count of lines settled.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from openai import OpenAI
from openai.types import Batch

from jobs.settings import Settings
from tests.support.processes import peak_memory_bytes, server_process, wait_until
from tests.support.valkey import running_valkey

_ROOT: Final = Path(__file__).parents[1]
_MODEL: Final = "tiny"
_CONFIG: Final = {"model_type": "llama", "max_position_embeddings": 4_096, "vocab_size": 1_000}
_ENGINE: Final = {"block_rows": 4_096, "max_context_tokens": 4_096}
_TEXT: Final = "Name the harbour that the ship calls at next, and what it unloads there. " * 4
_START_LIMIT_S: Final = 120.0
_POLL_S: Final = 0.1
_PARTS: Final = 4


@dataclasses.dataclass(slots=True, kw_only=True)
class Stages:
    """When each stage ended, and what CPU time each role had used by then."""

    processes: Mapping[str, int]
    marks: list[tuple[str, float, dict[str, float]]] = dataclasses.field(default_factory=list)
    progress: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """Lines completed, and the worker's CPU seconds by then."""

    def end(self, name: str) -> None:
        cpu_s = {role: cpu_time_s(process_id) for role, process_id in self.processes.items()}
        self.marks.append((name, time.monotonic(), cpu_s))

    def look(self, batch: Batch) -> None:
        """Whenever lines were completed since the last look."""
        num_completed = batch.request_counts.completed if batch.request_counts else 0
        if not self.progress or num_completed > self.progress[-1][0]:
            self.progress.append((num_completed, cpu_time_s(self.processes["worker"])))


def cpu_time_s(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def chat_lines(num_lines: int) -> Iterator[bytes]:
    for index in range(num_lines):
        messages = [{"role": "user", "content": f"{index}: {_TEXT}"}]
        body = {"model": _MODEL, "messages": messages, "max_tokens": 1}
        fields = {"custom_id": f"line-{index}", "method": "POST", "url": "/v1/chat/completions"}
        yield json.dumps({**fields, "body": body}).encode() + b"\n"


@contextlib.contextmanager
def role(name: str, settings: Settings, options: Mapping[str, object]) -> Iterator[int]:
    """One role with the fake engine; its process id."""
    command = [sys.executable, "-m", "tests.support.roles", name, json.dumps(options)]
    environment = {**os.environ, **settings.to_environment(), "PYTHONPATH": str(_ROOT)}
    log = settings.state_dir / f"{name}.log"
    with (
        log.open("ab") as stream,
        subprocess.Popen(command, cwd=_ROOT, env=environment, stderr=stream, stdout=stream) as one,
    ):
        try:
            yield one.pid
        finally:
            one.send_signal(signal.SIGTERM)


def carry(client: OpenAI, path: Path, stages: Stages) -> Batch:
    """The batch from upload to download, its stages noted."""
    stages.end("start")
    with path.open("rb") as stream:
        file = client.files.create(file=stream, purpose="batch")
    stages.end("upload")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    for name, statuses in (
        ("validate", ("validating",)),
        ("run", ("in_progress",)),
        ("finalize", ("finalizing",)),
    ):
        while batch.status in statuses:
            time.sleep(_POLL_S)
            batch = client.batches.retrieve(batch.id)
            stages.look(batch)
        stages.end(name)
    assert batch.status == "completed", batch
    assert batch.output_file_id is not None
    with client.files.with_streaming_response.content(batch.output_file_id) as answer:
        answer.stream_to_file(path.with_suffix(".out"))
    stages.end("download")
    return batch


def check(answers: Path, reports: Path, num_lines: int) -> None:
    """Each line is answered once and in its place, and was settled once. The worker has ended."""
    with answers.open("rb") as stream:
        found = [json.loads(line)["custom_id"] for line in stream]
    assert found == [f"line-{index}" for index in range(num_lines)]
    settled = [json.loads(path.read_text())["num_settled_lines"] for path in reports.iterdir()]
    assert sum(settled) == num_lines, settled


def show_growth(stages: Stages) -> None:
    """The worker's CPU time a line in each part of the batch."""
    last = stages.progress[-1][0]
    marks = [
        next(mark for mark in stages.progress if mark[0] >= last * part // _PARTS)
        for part in range(_PARTS + 1)
    ]
    costs = [
        1e3 * (later_s - earlier_s) / max(1, later - earlier)
        for (earlier, earlier_s), (later, later_s) in itertools.pairwise(marks)
    ]
    print("worker cpu ms a line, part by part: " + " ".join(f"{cost:.3f}" for cost in costs))


def show(stages: Stages, num_lines: int) -> None:
    roles = list(stages.processes)
    print(
        f"{'stage':<10}{'wall s':>9}{'lines/s':>10}" + "".join(f"{x + ' cpu':>13}" for x in roles)
    )
    begun = stages.marks[0]
    pairs = list(zip(stages.marks, stages.marks[1:], strict=False))
    for (_, earlier_s, earlier), (name, later_s, later) in [*pairs, (begun, stages.marks[-1])]:
        label = "all" if earlier_s == begun[1] and name == "download" else name
        taken_s = later_s - earlier_s
        cpu = "".join(f"{later[each] - earlier[each]:>13.2f}" for each in roles)
        print(f"{label:<10}{taken_s:>9.2f}{num_lines / taken_s:>10.0f}{cpu}")
    for each in roles:
        print(f"peak memory of {each}: {peak_memory_bytes(stages.processes[each]) / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=50_000)
    num_lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory(prefix="freight-pipeline-") as name, running_valkey() as redis:
        folder = Path(name)
        (folder / _MODEL).mkdir()
        (folder / _MODEL / "config.json").write_text(json.dumps(_CONFIG))
        settings = Settings(
            state_dir=folder / "state",
            redis_url=redis,
            model=str(folder / _MODEL),
            accumulation_window_s=0.1,
        )
        settings.state_dir.mkdir()
        path = folder / "in.jsonl"
        with path.open("wb") as stream:
            stream.writelines(chat_lines(num_lines))
        with (
            server_process(settings) as (server, url),
            role("intake", settings, {}) as intake,
            role("worker", settings, _ENGINE) as worker,
            OpenAI(base_url=f"{url}/v1", api_key="any") as client,
        ):
            wait_until(lambda: bool(client.models.list().data), limit_s=_START_LIMIT_S)
            stages = Stages(processes={"server": server.pid, "intake": intake, "worker": worker})
            batch = carry(client, path, stages)
            print(f"{num_lines} lines, {path.stat().st_size / 1e6:.1f} MB in")
            show(stages, num_lines)
            show_growth(stages)
        check(path.with_suffix(".out"), settings.state_dir / "reports", num_lines)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == num_lines


if __name__ == "__main__":
    main()
