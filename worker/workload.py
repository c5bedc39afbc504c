"""From the queue's shape to the workload that a planner is told."""

from typing import Final

from engine.planning.cost import KV_PAGE_TOKENS
from engine.planning.workload import Request, Workload
from worker.queue_shape import QueueShape, RowKind

_LEAST_SHARED_TOKENS: Final = 2 * KV_PAGE_TOKENS
"""A shorter prefix is computed by each row for itself."""

_UNKNOWN_PROMPT_TOKENS: Final = 256
_UNKNOWN_OUTPUT_TOKENS: Final = 128
_UNKNOWN_ROWS: Final = 10_000


def workload_of(queue: QueueShape, *, max_context_tokens: int) -> Workload:
    """Of an empty queue nothing is known: many rows of a usual length, as far as they fit."""
    if not queue.kinds:
        output_tokens = min(_UNKNOWN_OUTPUT_TOKENS, max_context_tokens // 2)
        prompt_tokens = min(_UNKNOWN_PROMPT_TOKENS, max_context_tokens - output_tokens)
        return Workload.uniform(prompt_tokens, output_tokens, num_rows=_UNKNOWN_ROWS)
    requests = [_request(kind) for kind in queue.kinds]
    return Workload.of(requests, num_rows=max(1, round(queue.num_rows)))


def _request(kind: RowKind) -> Request:
    prompt_tokens = max(1, round(kind.prompt_tokens))
    max_output_tokens = max(1, round(kind.limit_tokens))
    shared = int(kind.shared_tokens) // KV_PAGE_TOKENS * KV_PAGE_TOKENS
    shared = min(shared, (prompt_tokens - 1) // KV_PAGE_TOKENS * KV_PAGE_TOKENS)
    return Request(
        num_prompt_tokens=prompt_tokens,
        num_output_tokens=min(max(1.0, kind.output_tokens), max_output_tokens),
        max_output_tokens=max_output_tokens,
        num_shared_tokens=shared if shared >= _LEAST_SHARED_TOKENS else 0,
        count=kind.num_rows,
    )
