"""The flow that users copy, with whatever client is installed: `python flow.py http://host:port`.

It runs in environments of its own, so it imports nothing but the client. Prints one line at the
end, or raises.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai

FINAL = ("completed", "failed", "expired", "cancelled")
ENDPOINT = "/v1/completions"


def main(url: str) -> None:
    options: dict[str, Any] = {
        "base_url": f"{url}/v1",
        "api_key": "any",
        "_strict_response_validation": True,
    }
    with openai.OpenAI(**options) as client:
        model = client.models.list().data[0].id
        assert client.models.retrieve(model).id == model
        uploaded(client, model)
        completed(client, model)
        refused(client, model)
        cancelled(client, model)
        paged(client)
        conflicting(client)
    asyncio.run(without_blocking(options, model))
    print(f"openai {openai.__version__}: all well")


def lines(model: str, max_tokens: list[int]) -> bytes:
    text = ""
    for index, limit in enumerate(max_tokens):
        body = {"model": model, "prompt": f"Größe {index} 😀", "max_tokens": limit}
        line = {"custom_id": f"c-{index}", "method": "POST", "url": ENDPOINT, "body": body}
        text += json.dumps(line) + "\n"
    return text.encode()


def submitted(client: openai.OpenAI, raw: bytes) -> Any:
    file = client.files.create(file=("in.jsonl", raw), purpose="batch")
    wish: dict[str, Any] = {
        "endpoint": ENDPOINT,
        "completion_window": "24h",
        "metadata": {"job": "flow"},
    }
    return client.batches.create(input_file_id=file.id, **wish)


def ended(client: openai.OpenAI, batch: Any) -> Any:
    while batch.status not in FINAL:
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def rows(client: openai.OpenAI, file_id: str) -> list[Any]:
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def uploaded(client: openai.OpenAI, model: str) -> None:
    """Points 15 and 33."""
    raw = lines(model, [1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "Größe.jsonl"
        path.write_bytes(raw)
        with path.open("rb") as stream:
            file = client.files.create(file=stream, purpose="batch")
    assert (file.object, file.status, file.bytes) == ("file", "processed", len(raw))
    assert file.filename == "Größe.jsonl"
    assert client.files.content(file.id).read() == raw
    assert client.files.retrieve(file.id) == file
    assert client.files.delete(file.id).deleted
    try:
        client.files.retrieve(file.id)
    except openai.NotFoundError as error:
        assert error.param == "id"
    else:
        raise AssertionError("a deleted file was found")


def completed(client: openai.OpenAI, model: str) -> None:
    """Point 90, the good half."""
    batch = ended(client, submitted(client, lines(model, [1, 2, 3])))
    assert (batch.status, batch.error_file_id) == ("completed", None)
    assert [row["custom_id"] for row in rows(client, batch.output_file_id)] == ["c-0", "c-1", "c-2"]
    assert batch.request_counts.completed == 3
    assert batch.metadata == {"job": "flow"}


def refused(client: openai.OpenAI, model: str) -> None:
    """Point 90, the bad half; and a file that fails as a whole."""
    batch = ended(client, submitted(client, lines(model, [-1, -1])))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert len(rows(client, batch.error_file_id)) == 2
    batch = ended(client, submitted(client, lines(model, [1]) + b"oops\n"))
    assert batch.status == "failed"
    assert batch.errors.data[0].code == "invalid_json_line"


def cancelled(client: openai.OpenAI, model: str) -> None:
    """Point 102."""
    batch = submitted(client, lines(model, [1, 200, 200]))
    while batch.request_counts.completed == 0:
        batch = client.batches.retrieve(batch.id)
    batch = ended(client, client.batches.cancel(batch.id))
    assert batch.status == "cancelled"
    assert [row["custom_id"] for row in rows(client, batch.output_file_id)] == ["c-0"]
    errors = rows(client, batch.error_file_id)
    assert [row["error"]["code"] for row in errors] == ["batch_cancelled"] * 2
    assert client.batches.cancel(batch.id) == batch


def paged(client: openai.OpenAI) -> None:
    """Points 42 and 114."""
    assert len({batch.id for batch in client.batches.list(limit=2)}) >= 4
    for order in ("asc", "desc"):
        files = [file.id for file in client.files.list(order=order, limit=3)]
        assert len(files) == len(set(files)) >= 4


def conflicting(client: openai.OpenAI) -> None:
    batch = next(batch for batch in client.batches.list() if batch.status == "completed")
    try:
        client.batches.cancel(batch.id)
    except openai.ConflictError as error:
        assert error.request.headers["x-stainless-retry-count"] == "0"
    else:
        raise AssertionError("a completed batch was cancelled")


async def without_blocking(options: dict[str, Any], model: str) -> None:
    async with openai.AsyncOpenAI(**options) as client:
        file = await client.files.create(file=lines(model, [1, 2]), purpose="batch")
        assert file.filename == "upload"
        wish: dict[str, Any] = {"endpoint": ENDPOINT, "completion_window": "24h"}
        batch = await client.batches.create(input_file_id=file.id, **wish)
        while batch.status not in FINAL:
            await asyncio.sleep(0.02)
            batch = await client.batches.retrieve(batch.id)
        assert batch.output_file_id is not None
        content = await client.files.content(batch.output_file_id)
        assert len(content.text.splitlines()) == 2
        assert batch.id in [found.id async for found in client.batches.list(limit=2)]
        assert file.id in [found.id async for found in client.files.list(limit=3)]


if __name__ == "__main__":
    main(sys.argv[1])
