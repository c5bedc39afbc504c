"""How much memory the server needs for a full-size batch file: it must not depend on its size.

    python bench/server_memory.py [checkpoint]

Uploads 200 MiB in 50,000 lines through the official client, has the real intake validate them,
polls and lists meanwhile, downloads the input twice at once, cancels, downloads the 50,000 error
lines, and reads the peaks of resident memory. Exits with 1 if the server's is over the limit.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from openai import OpenAI

from cli.valkey import embedded_valkey
from jobs.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_LINES = 50_000
NUM_LOOKS = 100
FILE_BYTES = 200 * 2**20
LIMIT_BYTES = 300 * 10**6
START_LIMIT_S = 120.0
WORK_LIMIT_S = 1_200.0
POLL_S = 0.2
WORD = "freight "  # so that 4 KB of it are some 1,000 tokens, and fit any context


def write_requests(path: Path, model_id: str) -> None:
    """50,000 lines that together have exactly the largest permitted size."""
    with path.open("wb") as file:
        for index in range(NUM_LINES):
            size = (FILE_BYTES * (index + 1)) // NUM_LINES - (FILE_BYTES * index) // NUM_LINES
            message = {"role": "user", "content": ""}
            line = {
                "custom_id": f"r{index}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": model_id, "messages": [message], "max_tokens": 16},
            }
            num_characters = size - 1 - len(json.dumps(line))
            message["content"] = (WORD * (num_characters // len(WORD) + 1))[:num_characters]
            file.write(json.dumps(line).encode() + b"\n")


@contextlib.contextmanager
def running(role: str, settings: Settings) -> Iterator[int]:
    """Yield the role's process id."""
    command = [sys.executable, "-m", "cli.main", role]
    environment = {**os.environ, **settings.to_environment()}
    log = settings.state_dir / f"{role}.log"
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream
        ) as process,
    ):
        try:
            yield process.pid
        except BaseException:
            print(f"the end of {role}'s log:\n{log.read_text()[-2_000:]}", file=sys.stderr)
            raise
        finally:
            process.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_port(port: int) -> None:
    def listens() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True
        return False

    await_that(listens, limit_s=START_LIMIT_S)


def await_that(holds: Callable[[], bool], *, limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > end_s:
            raise TimeoutError(f"waited {limit_s:g} s in vain")
        time.sleep(POLL_S)


def await_status(client: OpenAI, batch_id: str, status: str) -> None:
    """Polls and lists as an impatient client does."""

    def reached() -> bool:
        found = client.batches.retrieve(batch_id)
        assert found.status in (status, "validating", "cancelling"), found
        assert len(client.files.list().data) >= 1 == len(client.batches.list().data)
        return found.status == status

    await_that(reached, limit_s=WORK_LIMIT_S)


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def download(client: OpenAI, file_id: str) -> tuple[int, int]:
    """Bytes and lines of the file, none of which is kept."""
    num_bytes = num_lines = 0
    with client.files.with_streaming_response.content(file_id) as answer:
        for chunk in answer.iter_bytes():
            num_bytes += len(chunk)
            num_lines += chunk.count(b"\n")
    return num_bytes, num_lines


def download_twice(client: OpenAI, file_id: str) -> None:
    received: list[tuple[int, int]] = []
    threads = [
        threading.Thread(target=lambda: received.append(download(client, file_id)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received == [(FILE_BYTES, NUM_LINES)] * 2, received


def upload(client: OpenAI, path: Path) -> str:
    with path.open("rb") as stream:
        return client.files.create(file=stream, purpose="batch").id


def create(client: OpenAI, file_id: str) -> str:
    return client.batches.create(
        input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
    ).id


def look(client: OpenAI, batch_id: str) -> None:
    for _ in range(NUM_LOOKS):
        counts = client.batches.retrieve(batch_id).request_counts
        assert counts is not None
        assert (counts.total, counts.failed) == (NUM_LINES, 0)
        assert len(client.files.list().data) == len(client.batches.list().data) == 1


def download_errors(client: OpenAI, batch_id: str) -> None:
    error_file_id = client.batches.retrieve(batch_id).error_file_id
    assert error_file_id is not None
    _, num_lines = download(client, error_file_id)
    assert num_lines == NUM_LINES, num_lines


class Table:
    """Rows of what was done, how long it took, and the peaks until then."""

    def __init__(self, **processes: int) -> None:
        self._processes = processes
        columns = "".join(f"{name + ' peak':>16}" for name in processes)
        print(f"{'':<28}{'time':>10}{columns}", flush=True)

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[None]:
        started_s = time.monotonic()
        yield
        taken_s = time.monotonic() - started_s
        peaks = [peak_bytes(process) for process in self._processes.values()]
        columns = "".join(f"{peak / 1e6:>13.1f} MB" for peak in peaks)
        print(f"{name:<28}{taken_s:>8.2f} s{columns}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO_MODEL)
    checkpoint = parser.parse_args().checkpoint.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        state_dir, path = Path(folder) / "state", Path(folder) / "in.jsonl"
        settings = Settings(
            state_dir=state_dir,
            port=free_port(),
            redis_url=stack.enter_context(embedded_valkey(state_dir)).url,
            model=str(checkpoint),
        )
        server = stack.enter_context(running("server", settings))
        intake = stack.enter_context(running("intake", settings))
        await_port(settings.port)
        client = stack.enter_context(
            OpenAI(base_url=f"http://127.0.0.1:{settings.port}/v1", api_key="any", max_retries=0)
        )
        await_that(lambda: bool(client.models.list().data), limit_s=START_LIMIT_S)
        write_requests(path, client.models.list().data[0].id)
        assert path.stat().st_size == FILE_BYTES

        table = Table(server=server, intake=intake)
        with table.row("idle"):
            pass
        with table.row("upload 200 MiB"):
            file_id = upload(client, path)
        with table.row("validate 50,000 lines"):
            batch_id = create(client, file_id)
            await_status(client, batch_id, "in_progress")
        with table.row(f"poll and list {NUM_LOOKS} times"):
            look(client, batch_id)
        with table.row("download input, twice"):
            download_twice(client, file_id)
        with table.row("cancel 50,000 lines"):
            client.batches.cancel(batch_id)
            await_status(client, batch_id, "cancelled")
        with table.row("download 50,000 errors"):
            download_errors(client, batch_id)
        is_over = peak_bytes(server) > LIMIT_BYTES
    print(f"limit {LIMIT_BYTES / 1e6:.0f} MB for the server: {'EXCEEDED' if is_over else 'kept'}")
    return int(is_over)


if __name__ == "__main__":
    sys.exit(main())
