"""What goes over the wire in tests: request lines out, error envelopes back."""

import json
from collections.abc import Mapping
from typing import Any

import httpx2


def request_lines(num_lines: int) -> bytes:
    return b"".join(
        json.dumps(
            {
                "custom_id": f"r{index}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
            }
        ).encode()
        + b"\n"
        for index in range(num_lines)
    )


def error_of(response: httpx2.Response) -> dict[str, object]:
    """The error of an answer that must be a refusal in the documented envelope, and nothing else."""
    assert not response.is_success, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, object] = body["error"]
    return found


def form(fields: Mapping[str, bytes]) -> dict[str, Any]:
    """A multipart request, its fields in that order; `file` and `data` are files."""
    body = b""
    for name, value in fields.items():
        filename = f'; filename="{name}.jsonl"' if name in ("file", "data") else ""
        head = f'--B\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'
        body += head.encode() + value + b"\r\n"
    headers = {"content-type": "multipart/form-data; boundary=B"}
    return {"content": body + b"--B--\r\n", "headers": headers}
