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
_LIKELY_TOKENS: Final = 4096
"""Of a row that may come next, whatever waits now: there is to be room for it."""

_HARDLY_ANY: Final = 1e-6


def workload_of(queue: QueueShape, *, longest_tokens: int) -> Workload:
    """No row is longer than `longest_tokens`. Of an empty queue nothing is known: many rows of a usual
    length, as far as they fit.
    """
    longest_tokens = max(2, longest_tokens)
    likely = min(_LIKELY_TOKENS, longest_tokens)
    some_row = Request(
        num_prompt_tokens=1,
        num_output_tokens=1.0,
        max_output_tokens=likely - 1,
        count=_HARDLY_ANY,
    )
    if queue.kinds:
        requests = [_request(kind, longest_tokens) for kind in queue.kinds]
        return Workload.of([*requests, some_row], num_rows=max(1, round(queue.num_rows)))
    output_tokens = min(_UNKNOWN_OUTPUT_TOKENS, likely // 2)
    usual = Workload.uniform(
        min(_UNKNOWN_PROMPT_TOKENS, likely - output_tokens), output_tokens, num_rows=_UNKNOWN_ROWS
    )
    return Workload.of([*usual.requests, some_row], num_rows=_UNKNOWN_ROWS)


def _request(kind: RowKind, longest_tokens: int) -> Request:
    prompt_tokens = min(max(1, round(kind.prompt_tokens)), longest_tokens - 1)
    max_output_tokens = min(max(1, round(kind.limit_tokens)), longest_tokens - prompt_tokens)
    shared = min(int(kind.shared_tokens), prompt_tokens - 1) // KV_PAGE_TOKENS * KV_PAGE_TOKENS
    return Request(
        num_prompt_tokens=prompt_tokens,
        num_output_tokens=min(max(1.0, kind.output_tokens), max_output_tokens),
        max_output_tokens=max_output_tokens,
        num_shared_tokens=shared if shared >= _LEAST_SHARED_TOKENS else 0,
        count=kind.num_rows,
    )
