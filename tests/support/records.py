"""Records of a batch and its lines as the ledger takes them, where it does not matter which they are."""

import dataclasses
from typing import Any

from jobs.batch import Batch, Endpoint, new_batch_id
from jobs.line import LineRecord


def batch_record(**changes: Any) -> Batch:
    """Of an id of its own, and long over unless `changes` say otherwise."""
    plain = Batch(
        id=new_batch_id(),
        endpoint=Endpoint.COMPLETIONS,
        input_file_id="file-x",
        completion_window="24h",
        created_at=100,
        expires_at=200,
    )
    return dataclasses.replace(plain, **changes)


def line_records(num_lines: int, *, shard_lines: int) -> list[LineRecord]:
    """In order, in shards of so many."""
    return [
        LineRecord(
            index=index,
            custom_id=str(index),
            offset_bytes=0,
            num_bytes=1,
            num_prompt_tokens=1,
            shard_index=index // shard_lines,
        )
        for index in range(num_lines)
    ]
