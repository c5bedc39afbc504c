"""What goes over the wire in tests: request lines out, error envelopes back."""

import json

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
