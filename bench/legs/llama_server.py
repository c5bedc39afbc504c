"""The leg that is llama.cpp's server: the whole job sent at once, its slots filled as they empty."""

import concurrent.futures
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from bench.legs.job import Job, Result, emit, read_bytes, this_job, total_tokens
from bench.workloads import Request

_HOST: Final = "127.0.0.1"
_START_LIMIT_S: Final = 300.0
_ANSWER_LIMIT_S: Final = 3_600.0
_POLL_S: Final = 0.1


@contextlib.contextmanager
def server(job: Job) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process and its port, once it is warm. Raises RuntimeError if it ends before."""
    with socket.socket() as finder:
        finder.bind((_HOST, 0))
        port = int(finder.getsockname()[1])
    slots = job.options["slots"]
    longest = max(len(request.token_ids) + request.max_tokens for request in job.requests)
    command = [
        *(job.options["program"], "-m", job.options["checkpoint"], "-t", str(job.threads)),
        *("-tb", str(job.threads), "-np", str(slots), "-c", str(slots * (longest + 8))),
        *("-b", "2048", "-ub", "512", "-lm", "mmap", "--host", _HOST, "--port", str(port)),
        *("--threads-http", "4", "--cache-ram", "0", "--no-ui"),
        *(["--no-repack"] if job.options.get("no_repack") else []),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sys.stderr) as process:
        try:
            _wait_until_healthy(process, port)
            yield process, port
        finally:
            process.kill()


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    ends_s = time.perf_counter() + _START_LIMIT_S
    while time.perf_counter() < ends_s and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if _ask(port, "GET", "/health", None)[0] == http.HTTPStatus.OK:
                return
        time.sleep(_POLL_S)
    raise RuntimeError(f"llama-server did not come up: it ended with {process.poll()}")


def _ask(port: int, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(_HOST, port, timeout=_ANSWER_LIMIT_S)
    with contextlib.closing(connection):
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def complete(port: int, request: Request, *, ignore_eos: bool) -> list[int]:
    """The answered tokens, without the end of sequence. Raises RuntimeError with a refusal."""
    body = {
        "prompt": list(request.token_ids),
        "n_predict": request.max_tokens,
        "temperature": 0,
        "samplers": ["temperature"],
        "ignore_eos": ignore_eos,
        "cache_prompt": True,
        "return_tokens": True,
    }
    status, answer = _ask(port, "POST", "/completion", body)
    if status != http.HTTPStatus.OK:
        raise RuntimeError(f"llama-server answered {status}: {answer}")
    tokens = [int(token) for token in answer["tokens"]]
    ended = answer.get("stop_type") == "eos"
    return tokens[:-1] if ended and len(tokens) == answer["tokens_predicted"] else tokens


def main() -> int:
    job = this_job()
    started_s = time.perf_counter()
    with server(job) as (process, port):
        warm_up = Request(key="", token_ids=(2, 3), max_tokens=1)
        complete(port, warm_up, ignore_eos=True)
        load_s = time.perf_counter() - started_s
        started_read_bytes = read_bytes(process.pid)
        begun_s = time.perf_counter()
        answers: dict[str, list[int]] = {}
        with concurrent.futures.ThreadPoolExecutor(len(job.requests)) as pool:
            asked = {
                pool.submit(complete, port, request, ignore_eos=job.ignore_eos): request.key
                for request in job.requests
            }
            for answered in concurrent.futures.as_completed(asked):
                answers[asked[answered]] = answered.result()
                emit(
                    Result(
                        seconds=time.perf_counter() - begun_s,
                        load_s=load_s,
                        output_tokens=sum(map(len, answers.values())),
                        total_tokens=total_tokens(job.requests, answers),
                        read_bytes=read_bytes(process.pid) - started_read_bytes,
                        is_whole=len(answers) == len(job.requests),
                        answers=answers,
                    )
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
