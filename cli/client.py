"""A batch as a client sees it, through the official client: sent, followed, fetched."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from openai import OpenAI
from openai.types import Batch

from cli.errors import StartError

Endpoint: TypeAlias = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
_ENDPOINTS: Final[tuple[Endpoint, ...]] = get_args(Endpoint)

_FINAL: Final = frozenset({"completed", "failed", "expired", "cancelled"})
_FIRST_POLL_S: Final = 0.2
_LONGEST_POLL_S: Final = 2.0
_MAX_RETRIES: Final = 5  # a server that restarts is back within them


def connect(url: str, *, api_key: str | None = None) -> OpenAI:
    """A client of the server at `url`. It insists on a key, also where the server asks for none."""
    base_url = f"{url.rstrip('/')}/v1"
    return OpenAI(base_url=base_url, api_key=api_key or "none", max_retries=_MAX_RETRIES)


def send(client: OpenAI, path: Path) -> Batch:
    """Upload `path` and start a batch on it. The lines' own url says which endpoint."""
    endpoint = _endpoint_of(path)
    with path.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="batch")
    return client.batches.create(
        input_file_id=uploaded.id, endpoint=endpoint, completion_window="24h"
    )


def _endpoint_of(path: Path) -> Endpoint:
    """What the first line asks for; the server checks the rest, and says more about it."""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline())
    except FileNotFoundError:
        raise StartError(f"there is no file {path}") from None
    except ValueError:
        first = None
    url = first.get("url") if isinstance(first, dict) else None
    return next((each for each in _ENDPOINTS if each == url), "/v1/chat/completions")


def follow(client: OpenAI, batch: Batch) -> Iterator[Batch]:
    """Yield the batch as it is now and then, the final state last."""
    pause_s = _FIRST_POLL_S
    while batch.status not in _FINAL:
        yield batch
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, _LONGEST_POLL_S)
        batch = client.batches.retrieve(batch.id)
    yield batch


def fetch(client: OpenAI, file_id: str, path: Path) -> None:
    """Download a file; `path` appears only when it is whole."""
    partial = path.with_name(f"{path.name}.part")
    with contextlib.ExitStack() as stack:
        stack.callback(partial.unlink, missing_ok=True)
        answer = stack.enter_context(client.files.with_streaming_response.content(file_id))
        answer.stream_to_file(partial)
        partial.replace(path)
