"""How much memory the server needs for a full-size batch file: it must not depend on its size.

    python bench/server_memory.py

Uploads 200 MiB in 50,000 lines through the official client, makes a batch of it, lists, downloads
it twice at once, and reads the server's peak of resident memory. Exits with 1 over the limit.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

NUM_LINES = 50_000
FILE_BYTES = 200 * 2**20
LIMIT_BYTES = 300 * 10**6
START_LIMIT_S = 60.0


def write_requests(path: Path) -> None:
    """50,000 lines that together have exactly the largest permitted size."""
    with path.open("wb") as file:
        for index in range(NUM_LINES):
            size = (FILE_BYTES * (index + 1)) // NUM_LINES - (FILE_BYTES * index) // NUM_LINES
            message = {"role": "user", "content": ""}
            line = {
                "custom_id": f"r{index}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "m", "messages": [message]},
            }
            message["content"] = "x" * (size - 1 - len(json.dumps(line)))
            file.write(json.dumps(line).encode() + b"\n")


@contextlib.contextmanager
def running_server(state_dir: Path) -> Iterator[tuple[int, str]]:
    """Yield its process id and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "FREIGHT_STATE_DIR": str(state_dir),
        "FREIGHT_PORT": str(port),
        "FREIGHT_REDIS_URL": "",
    }
    command = [sys.executable, "-m", "server.main"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            await_port(port)
            yield process.pid, f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def await_port(port: int) -> None:
    end_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end_s:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.05)
    raise TimeoutError(f"the server did not listen within {START_LIMIT_S:g} s")


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def download(client: OpenAI, file_id: str) -> None:
    with client.files.with_streaming_response.content(file_id) as answer:
        received = sum(len(chunk) for chunk in answer.iter_bytes())
    assert received == FILE_BYTES, received


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "in.jsonl"
        write_requests(path)
        assert path.stat().st_size == FILE_BYTES
        pid, url = stack.enter_context(running_server(Path(folder) / "state"))
        client = stack.enter_context(OpenAI(base_url=url, api_key="any", max_retries=0))
        client.models.list()
        rows = [("idle", 0.0, peak_bytes(pid))]

        def measured(name: str, started_s: float) -> None:
            rows.append((name, time.monotonic() - started_s, peak_bytes(pid)))

        started_s = time.monotonic()
        with path.open("rb") as stream:
            file = client.files.create(file=stream, purpose="batch")
        measured("upload 200 MiB", started_s)

        started_s = time.monotonic()
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        assert len(client.files.list().data) == len(client.batches.list().data) == 1
        measured("create batch, list", started_s)

        started_s = time.monotonic()
        threads = [threading.Thread(target=download, args=(client, file.id)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        measured("download twice at once", started_s)

    for name, taken_s, size_bytes in rows:
        print(f"{name:<24}{taken_s:>8.2f} s   peak {size_bytes / 1e6:>7.1f} MB")
    is_over = rows[-1][2] > LIMIT_BYTES
    print(f"limit {LIMIT_BYTES / 1e6:.0f} MB: {'EXCEEDED' if is_over else 'kept'}")
    return int(is_over)


if __name__ == "__main__":
    sys.exit(main())
