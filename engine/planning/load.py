"""What one sweep carries: decoding rows, prompt tokens, live keys and values; knows no machine."""

import dataclasses
import math

from engine.planning.cost import KV_PAGE_TOKENS
from engine.planning.workload import Request, Workload

_FIRST_ROOM_TOKENS = 32
"""Generated tokens that the block gives a new row's run room for."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Of one sweep. `rows` sample, `prompt_tokens` are computed beside them, `live_tokens` are
    cached and attended to by the decoding rows, those kept once counted once.

    `prompt_pairs` of a query and a cached token arise for each prompt token, in a layer without
    window; a prompt's own tokens are `prompt_length`.
    """

    rows: float
    prompt_tokens: float
    live_tokens: float
    context_tokens: float
    """Of one decoding row."""
    prompt_pairs: float
    prompt_length: float

    @property
    def tokens(self) -> float:
        """Of the sweep, in every layer."""
        return self.rows + self.prompt_tokens


def steady_load(workload: Workload, *, rows: float, sweep_tokens: int) -> Load:
    """Of a full block: each row that ends is replaced, so that for each generated token
    `prompt_tokens_per_output` of prompts are computed (offload-sota 2.1: P = B * s / g).

    Where a sweep may not carry that many, rows wait for their prompts, and fewer decode.
    """
    ratio = workload.prompt_tokens_per_output
    decoding = min(rows, sweep_tokens / ratio) if ratio else rows
    return load_of(
        workload,
        rows=decoding,
        prompt_tokens=decoding * ratio,
        live_tokens=decoding * workload.mean_live_tokens + workload.num_kept_once_tokens,
    )


def load_of(workload: Workload, *, rows: float, prompt_tokens: float, live_tokens: float) -> Load:
    """Of so many rows and tokens of that workload's kind."""
    own = workload.mean_own_tokens
    return Load(
        rows=rows,
        prompt_tokens=prompt_tokens,
        live_tokens=live_tokens,
        context_tokens=workload.mean_context_tokens,
        prompt_pairs=workload.mean_prompt_pairs / own,
        prompt_length=own,
    )


def kept_tokens(workload: Workload, *, rows: float) -> float:
    """Tokens of whole pages that `rows` running rows take of the cache, in steady state.

    A run has room for its prompt and some tokens first, and is doubled as it fills, up to the row's
    limit: what it takes on average over the row's life, and rows seen as often as they live long.
    """
    taken = workload.mean(lambda each: each.num_output_tokens * _room_over_life(each))
    shared = _paged(workload.num_kept_once_tokens) if workload.num_kept_once_tokens else 0
    return rows * taken / workload.mean_output_tokens + shared


def longest_row_tokens(workload: Workload) -> int:
    """Pages' tokens of the longest row allowed: a home must hold it alone."""
    return _paged(workload.longest_tokens)


def _room_over_life(request: Request) -> float:
    prompt, ends = request.num_own_tokens, request.num_own_tokens + request.num_output_tokens
    limit = prompt + request.max_output_tokens
    room, since, area = min(limit, prompt + _FIRST_ROOM_TOKENS), float(prompt), 0.0
    while room < ends:
        area += (room - since) * _paged(room)
        since, room = room, min(limit, 2 * room)
    area += (ends - since) * _paged(room)
    return area / request.num_output_tokens


def _paged(num_tokens: float) -> int:
    return math.ceil(num_tokens / KV_PAGE_TOKENS) * KV_PAGE_TOKENS
