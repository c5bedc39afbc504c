"""A whole installation: server, intake and worker over one ledger, with a fake engine."""

import dataclasses
import json
import time
from collections.abc import Iterable
from typing import Any

from openai import OpenAI
from openai.types import Batch

from tests.support.box import Box

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
FINAL = ("completed", "failed", "expired", "cancelled")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """`box` is what the installation keeps; `client` is strict."""

    url: str
    client: OpenAI
    box: Box

    def submit(
        self, lines: Iterable[str] | bytes, *, endpoint: str = COMPLETIONS, **more: Any
    ) -> Batch:
        raw = lines if isinstance(lines, bytes) else "".join(f"{x}\n" for x in lines).encode()
        file = self.client.files.create(file=raw, purpose="batch")
        return self.client.batches.create(
            input_file_id=file.id,
            endpoint=endpoint,  # type: ignore[arg-type]  # the client lists endpoints as literals
            completion_window="24h",
            **more,
        )

    def wait(self, batch_id: str, *, limit_s: float = 60) -> Batch:
        end_s = time.monotonic() + limit_s
        while (batch := self.client.batches.retrieve(batch_id)).status not in FINAL:
            assert time.monotonic() < end_s, batch
            time.sleep(0.02)
        return batch

    def run(self, lines: Iterable[str] | bytes, **more: Any) -> Batch:
        return self.wait(self.submit(lines, **more).id)

    def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        text = self.client.files.content(file_id).text
        return [json.loads(line) for line in text.splitlines()]


def faults_of(batch: Batch) -> list[tuple[str | None, int | None, str | None]]:
    """Code, line and param of each error."""
    assert batch.errors is not None
    return [(fault.code, fault.line, fault.param) for fault in batch.errors.data or []]
