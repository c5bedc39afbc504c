"""One JSONL line in, one out: parsing and checking a request line, forming a result line."""

import dataclasses
import enum
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from jobs.answers import Usage
from jobs.batch import Endpoint, LineFault
from jobs.errors import InvalidRequestError
from jobs.values import SURROGATE, missing, read_json, shown, unknown, wrong_type

MAX_CUSTOM_ID_CHARACTERS: Final = 512
_KEYS: Final = ("custom_id", "method", "url", "body")
_KINDS: Final[Mapping[Endpoint, str]] = {
    Endpoint.CHAT_COMPLETIONS: "Chat Completions",
    Endpoint.COMPLETIONS: "Completions",
    Endpoint.EMBEDDINGS: "Embeddings",
    Endpoint.RESPONSES: "Responses",
}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


class Outcome(enum.StrEnum):
    """How a line ended. Only the first two are counted; each line has exactly one."""

    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestLine:
    """A line that is what it should be on the outside; its body is checked by who renders it."""

    custom_id: str
    body: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LineRecord:
    """Where a request line lies in the batch's input, and which shard carries it."""

    index: int
    custom_id: str
    offset_bytes: int
    num_bytes: int
    num_prompt_tokens: int
    shard_index: int

    def as_row(self) -> dict[str, Any]:
        # Spelled out: `asdict` copies deeply, and this is done for every line.
        return {
            "line_index": self.index,
            "custom_id": self.custom_id,
            "offset_bytes": self.offset_bytes,
            "num_bytes": self.num_bytes,
            "num_prompt_tokens": self.num_prompt_tokens,
            "shard_index": self.shard_index,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResultRecord:
    """What the ledger keeps of a settled line; `row` is its finished JSONL line."""

    batch_id: str
    line_index: int
    outcome: Outcome
    row: str
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def as_row(self) -> dict[str, Any]:
        return {
            "batch_id": self.batch_id,
            "line_index": self.line_index,
            "outcome": self.outcome,
            "row": self.row,
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
        }


def parse_request_line(
    raw: bytes, *, line: int, endpoint: Endpoint
) -> tuple[RequestLine | None, list[LineFault]]:
    """The line, or None and all its faults. `line` is 1-based, for the faults."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None, [_not_json(line, "This line is not valid UTF-8.")]
    try:
        data = read_json(text)
    except (ValueError, RecursionError):
        return None, [_not_json(line, "This line is not parseable as valid JSON.")]
    if not isinstance(data, dict):
        return None, [_not_json(line, "This line is not parseable as valid JSON.")]
    faults = _outer_faults(data, endpoint)
    if "body" in data:
        faults += _body_faults(data["body"], endpoint)
    if faults:
        return None, [dataclasses.replace(fault, line=line) for fault in faults]
    return RequestLine(custom_id=data["custom_id"], body=data["body"]), []


def _outer_faults(data: dict[str, Any], endpoint: Endpoint) -> list[LineFault]:
    faults = [_fault(missing(key)) for key in _KEYS if key not in data]
    faults += [_fault(unknown(key)) for key in data if key not in _KEYS]
    if "custom_id" in data:
        faults += _custom_id_faults(data["custom_id"])
    if "method" in data and data["method"] != "POST":
        message = "Invalid value for 'method'. Supported values are: 'POST'."
        faults.append(LineFault(code="invalid_method", message=message, param="method"))
    if "url" in data and data["url"] != endpoint:
        message = "The URL provided for this request does not match the batch endpoint."
        faults.append(LineFault(code="invalid_url", message=message, param="url"))
    return faults


def _custom_id_faults(custom_id: object) -> list[LineFault]:
    if not isinstance(custom_id, str):
        return [_fault(wrong_type("custom_id", "a string", custom_id))]
    if not custom_id:
        return [_fault(missing("custom_id"))]
    if len(custom_id) > MAX_CUSTOM_ID_CHARACTERS:
        message = (
            "Invalid 'custom_id': string too long. Expected a string with maximum length "
            f"{MAX_CUSTOM_ID_CHARACTERS}, but got a string with length {len(custom_id)} instead."
        )
        return [LineFault(code="string_above_max_length", message=message, param="custom_id")]
    if _CONTROL.search(custom_id) or SURROGATE.search(custom_id):
        message = "Invalid 'custom_id': control characters are not allowed."
        return [LineFault(code="invalid_value", message=message, param="custom_id")]
    return []


def _body_faults(body: object, endpoint: Endpoint) -> list[LineFault]:
    if not isinstance(body, dict):
        return [_fault(wrong_type("body", "an object", body))]
    faults = []
    if not isinstance(body.get("model"), str) or not body["model"]:
        message = "Model parameter is required."
        faults.append(LineFault(code="invalid_request", message=message, param="body.model"))
    if endpoint is Endpoint.CHAT_COMPLETIONS and not body.get("messages"):
        message = "Messages parameter is required."
        faults.append(LineFault(code="invalid_request", message=message, param="body.messages"))
    if endpoint is Endpoint.COMPLETIONS and body.get("prompt") in (None, "", []):
        message = "Prompt parameter is required."
        faults.append(LineFault(code="invalid_request", message=message, param="body.prompt"))
    takes_input = endpoint in {Endpoint.EMBEDDINGS, Endpoint.RESPONSES}
    if takes_input and body.get("input") in (None, "", []):
        message = "Input parameter is required."
        faults.append(LineFault(code="invalid_request", message=message, param="body.input"))
    if body.get("stream"):
        message = f"{_KINDS[endpoint]}: Streaming is not supported in the Batch API."
        faults.append(LineFault(code="streaming_unsupported", message=message, param="body.stream"))
    return faults


def duplicate_fault(custom_id: str, *, line: int) -> LineFault:
    message = (
        f"The custom_id '{custom_id}' for this request is a duplicate of another request. "
        "The custom_id parameter must be unique for each request in a batch."
    )
    return LineFault(code="duplicate_custom_id", message=message, line=line, param="custom_id")


def mismatched_model_fault(model: str, *, line: int) -> LineFault:
    message = (
        f"The model '{shown(model)}' for this request does not match the rest of the batch. "
        "Each batch must contain requests for a single model."
    )
    return LineFault(code="mismatched_model", message=message, line=line, param="body.model")


def unknown_model_fault(model: str, *, line: int) -> LineFault:
    message = f"The provided model '{shown(model)}' is not supported by the Batch API."
    return LineFault(code="model_not_found", message=message, line=line, param="body.model")


def http_result(
    batch_id: str, line: LineRecord, *, status_code: int, body: Mapping[str, Any]
) -> dict[str, Any]:
    """A result line that got an HTTP-like answer, 200 or an error envelope in `body`."""
    response = {
        "status_code": status_code,
        "request_id": f"req_{_digest(batch_id, line.index, 'request')}",
        "body": body,
    }
    return _result(batch_id, line, response=response, error=None)


def completed_result(
    batch_id: str,
    line: LineRecord,
    *,
    body: Mapping[str, Any],
    usage: Usage,
) -> ResultRecord:
    return ResultRecord(
        batch_id=batch_id,
        line_index=line.index,
        outcome=Outcome.COMPLETED,
        row=format_row(http_result(batch_id, line, status_code=200, body=body)),
        input_tokens=usage.input_tokens,
        cached_tokens=usage.cached_tokens,
        output_tokens=usage.output_tokens,
    )


def refused_result(
    batch_id: str, line: LineRecord, *, status_code: int, error: Mapping[str, Any]
) -> ResultRecord:
    """A line that ran into an error; `error` has message, type, param and code."""
    body = {"error": dict(error)}
    return ResultRecord(
        batch_id=batch_id,
        line_index=line.index,
        outcome=Outcome.FAILED,
        row=format_row(http_result(batch_id, line, status_code=status_code, body=body)),
    )


def broken_result(batch_id: str, line: LineRecord, *, message: str) -> ResultRecord:
    """A line that the user is not to blame for."""
    return refused_result(batch_id, line, status_code=500, error=broken_error(message))


def broken_error(message: str) -> dict[str, Any]:
    return {"message": message, "type": "server_error", "param": None, "code": "server_error"}


def unrun_result(batch_id: str, line: LineRecord, outcome: Outcome) -> ResultRecord:
    """A line that never ran: the batch was cancelled or its window ended."""
    code, message = {
        Outcome.EXPIRED: (
            "batch_expired",
            "This request could not be executed before the completion window expired.",
        ),
        Outcome.CANCELLED: (
            "batch_cancelled",
            "This request was not executed because the batch was cancelled.",
        ),
    }[outcome]
    result = _result(batch_id, line, response=None, error={"code": code, "message": message})
    return ResultRecord(
        batch_id=batch_id, line_index=line.index, outcome=outcome, row=format_row(result)
    )


def format_row(result: Mapping[str, Any]) -> str:
    """JSON without line breaks of any kind: Unicode's own separators are escaped too."""
    text = json.dumps(result, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii() and SURROGATE.search(text):
        # A lone surrogate cannot be UTF-8; it can only be escaped.
        return json.dumps(result, separators=(",", ":"))
    for separator in ("\u2028", "\u2029", "\x85"):
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text


def _result(batch_id: str, line: LineRecord, *, response: object, error: object) -> dict[str, Any]:
    return {
        "id": f"batch_req_{_digest(batch_id, line.index, 'line')}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }


def _digest(batch_id: str, index: int, kind: str) -> str:
    # Derived, not drawn: a file that is written again carries the same ids.
    return hashlib.sha256(f"{kind}:{batch_id}:{index}".encode()).hexdigest()[:32]


def _fault(refusal: InvalidRequestError) -> LineFault:
    assert refusal.code is not None
    return LineFault(code=refusal.code, message=refusal.message, param=refusal.param)


def _not_json(line: int, message: str) -> LineFault:
    return LineFault(code="invalid_json_line", message=message, line=line)
