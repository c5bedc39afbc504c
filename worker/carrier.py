"""What the block worker asks of whoever holds the rows of its jobs: shards of lines, parties of riders."""

from typing import Protocol

JobKey = tuple[str, int]
"""A batch's id and a shard's index, or a party's id and 0."""


class Carrier(Protocol):
    def take(
        self, key: JobKey, *, at_once: int | None = None, on_last_try: bool = False
    ) -> int: ...
    def blame_first(self, key: JobKey) -> None: ...
    def num_open(self, key: JobKey) -> int: ...
    def drop(self, key: JobKey) -> None: ...
