"""One installation in a folder: real ledger, real file store, real Redis, roles as processes."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from redis import Redis
from rq import Queue

from jobs.batch import Batch, BatchOptions, BatchStatus, Endpoint, new_batch_id
from jobs.file import new_file_id
from jobs.ledger.ledger import Ledger
from jobs.queue import BLOCK_QUEUE, Doorbell
from jobs.settings import Settings
from jobs.tenant import Caller
from tests.support.fake_engine import FakeTokenizer
from worker.context import IntakeContext, open_store
from worker.main import connect
from worker.model import served_model
from worker.render import Renderer

ROOT = Path(__file__).parents[2]
MODEL = "tiny"


def completion_line(index: int, *, max_tokens: int = 2, prompt: object = None, **body: Any) -> str:
    text = f"prompt {index}" if prompt is None else prompt
    fields = {"model": MODEL, "prompt": text, "max_tokens": max_tokens, **body}
    line = {"custom_id": f"c-{index}", "method": "POST", "url": "/v1/completions", "body": fields}
    return json.dumps(line)


def chat_line(index: int, **body: Any) -> str:
    fields = {"model": MODEL, "messages": [{"role": "user", "content": f"hi {index}"}], **body}
    url = "/v1/chat/completions"
    return json.dumps({"custom_id": f"c-{index}", "method": "POST", "url": url, "body": fields})


class Box:
    def __init__(self, folder: Path, redis_url: str, **settings: Any) -> None:
        (folder / MODEL).mkdir(exist_ok=True)
        config = {"model_type": "llama", "max_position_embeddings": 256, "vocab_size": 1_000}
        (folder / MODEL / "config.json").write_text(json.dumps(config))
        defaults = Settings(
            state_dir=folder / "state",
            redis_url=redis_url,
            model=str(folder / MODEL),
            accumulation_window_s=0.05,
            lease_s=2,
            reconcile_s=0.3,
            shard_lines=4,
        )
        self.settings = dataclasses.replace(defaults, **settings)
        self.ledger = Ledger.open(self.settings.ledger_url)
        self.store = open_store(self.settings)
        self.redis: Redis = connect(self.settings)
        self.doorbell = Doorbell(self.redis)
        self.witness = folder / "witness.jsonl"

    def close(self) -> None:
        self.ledger.close()
        self.redis.close()

    def add(
        self,
        content: Iterable[str] | bytes,
        *,
        endpoint: Endpoint = Endpoint.COMPLETIONS,
        window_s: float = 86_400,
        caller: Caller | None = None,
        ring: bool = True,
        options: BatchOptions | None = None,
    ) -> str:
        now = int(time.time())
        batch = Batch(
            id=new_batch_id(),
            endpoint=endpoint,
            input_file_id=new_file_id(),
            completion_window="24h",
            created_at=now,
            expires_at=int(now + window_s),
            options=options or BatchOptions(),
        )
        raw = content if isinstance(content, bytes) else "".join(f"{x}\n" for x in content).encode()
        with self.store.write(batch.input_blob) as stream:
            stream.write(raw)
        (self.ledger.seen_by(caller) if caller else self.ledger).batches.add(batch)
        if ring:
            self.doorbell.validate(batch.id)
        return batch.id

    def intake_context(self) -> IntakeContext:
        """What intake's tasks work with, in this process."""
        served = served_model(self.settings)
        self.ledger.models.serve(served)
        return IntakeContext(
            settings=self.settings,
            ledger=self.ledger,
            store=self.store,
            doorbell=self.doorbell,
            renderer=Renderer(
                tokenizer=FakeTokenizer(), max_context_tokens=served.max_context_tokens
            ),
            model_id=served.id,
        )

    def batch(self, batch_id: str) -> Batch:
        return self.ledger.batches.get(batch_id)

    def wait(self, batch_id: str, *, seconds: float = 60) -> Batch:
        self.until(lambda: self.batch(batch_id).status.is_final, seconds=seconds)
        return self.batch(batch_id)

    def until(self, condition: Callable[[], object], *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.02)

    def num_settled(self, batch_id: str) -> int:
        counts = self.batch(batch_id).request_counts
        return counts.completed + counts.failed

    def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        with self.store.read(file_id) as stream:
            return [json.loads(line) for line in stream.read().decode().splitlines()]

    def custom_ids(self, batch: Batch) -> list[str]:
        rows = self.rows(batch.output_file_id) + self.rows(batch.error_file_id)
        return [row["custom_id"] for row in rows]

    def submitted(self) -> list[str]:
        """Keys of all prompts that any engine was ever given, off the engines' call log."""
        return [call["key"] for call in self.calls("submit")]

    def calls(self, event: str) -> list[dict[str, Any]]:
        """Lines of one kind of the witness, the call log of every engine there was."""
        if not self.witness.exists():
            return []
        calls = [json.loads(line) for line in self.witness.read_text().splitlines()]
        return [call for call in calls if call["event"] == event]

    def cancel(self, batch_id: str) -> None:
        assert self.ledger.batches.advance(batch_id, BatchStatus.CANCELLING)
        self.doorbell.finalize(batch_id)

    @property
    def queue(self) -> Queue:
        return Queue(BLOCK_QUEUE, connection=self.redis)

    def reports(self) -> list[dict[str, Any]]:
        files = sorted((self.settings.state_dir / "reports").glob("*.json"))
        return [json.loads(path.read_text()) for path in files]

    def start(self, role: str, **options: Any) -> "subprocess.Popen[bytes]":
        if role == "worker":
            options["witness"] = str(self.witness)
        command = [sys.executable, "-m", "tests.support.roles", role, json.dumps(options)]
        environment = {**os.environ, **self.settings.to_environment()}
        log = (self.settings.state_dir / f"{role}.log").open("ab")
        with log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    @contextlib.contextmanager
    def running(self, role: str, **options: Any) -> "Iterator[subprocess.Popen[bytes]]":
        process = self.start(role, **options)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
