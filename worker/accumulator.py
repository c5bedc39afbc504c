"""Shards in, recorded lines out: what the worker holds of which batches, and what became of it.

Knows the ledger and the rows in the engine; nothing of the queue that the shards came by.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable
from typing import BinaryIO, Final

import structlog

from engine.config import Completion, Prompt
from engine.errors import PromptError
from jobs.batch import Batch, BatchStatus
from jobs.errors import InvalidRequestError, RequestError
from jobs.ledger.ledger import Ledger
from jobs.line import (
    LineRecord,
    ResultRecord,
    completed_result,
    parse_request_line,
    refused_result,
)
from jobs.stores.base import FileStore
from worker.model import Engine
from worker.render import Renderer, error_body, parse_row_key, response_body, row_key
from worker.trials import Swept, Trials

log: Final = structlog.get_logger(__name__)
ShardKey = tuple[str, int]


@dataclasses.dataclass(slots=True, kw_only=True)
class HeldShard:
    """A claimed shard and its lines without a result. `is_given_up`: the ledger has to wait."""

    batch: Batch
    index: int
    pending: dict[int, LineRecord]
    is_given_up: bool = False
    is_last: bool = False

    @property
    def key(self) -> ShardKey:
        return self.batch.id, self.index


class Accumulator:
    def __init__(
        self,
        *,
        engine: Engine,
        ledger: Ledger,
        store: FileStore,
        renderer: Renderer,
        model_id: str,
    ) -> None:
        self._engine = engine
        self._trials = Trials(engine)
        self._ledger = ledger
        self._store = store
        self._renderer = renderer
        self.model_id = model_id
        self._shards: dict[ShardKey, HeldShard] = {}
        self._shard_of: dict[str, HeldShard] = {}  # by row key

    @property
    def num_rows(self) -> int:
        return self._trials.num_rows

    def rows_by_batch(self) -> dict[str, int]:
        rows: Counter[str] = Counter()
        for shard in self._shards.values():
            rows[shard.batch.id] += len(shard.pending)
        return {batch_id: num for batch_id, num in rows.items() if num}

    def take(self, key: ShardKey, *, at_once: int | None = None, on_last_try: bool = False) -> int:
        """Put the shard's unsettled lines into the block, all or so many at a time; how many.

        Raises NotFoundError for no such batch.
        """
        batch_id, index = key
        batch = self._batch(batch_id)
        shard = HeldShard(batch=batch, index=index, pending={})
        if batch.model != self.model_id or batch_id not in self._running([batch]):
            self._shards[key] = dataclasses.replace(shard, is_given_up=True)
            return 0
        with self._store.read(batch.input_blob) as stream:
            lines = self._ledger.lines.unsettled(batch_id, index)
            rendered = [self._render(batch, line, stream) for line in lines]
        # Only now: what cannot be rendered at all must not be held without a claim.
        shard.pending = {line.index: line for line in lines}
        self._shards[key] = shard
        self._shard_of |= {row_key(batch_id, line.index): shard for line in lines}
        prompts = [prompt for prompt in rendered if isinstance(prompt, Prompt)]
        if at_once is None:
            for prompt in prompts:
                self._trials.submit(prompt, on_last_try=on_last_try)
        else:
            self._trials.submit_in_turn(prompts, at_once=at_once)
        self._settle([result for result in rendered if isinstance(result, ResultRecord)])
        return len(prompts)

    def blame_first(self, key: ShardKey) -> None:
        """Settle the first open line of a shard that is not held: it ends every process."""
        batch = self._batch(key[0])
        lines = self._ledger.lines.unsettled(*key)
        if lines and batch.id in self._running([batch]):
            log.error("a line ends the process", batch_id=batch.id, line_index=lines[0].index)
            self._ledger.lines.record([_server_error(batch, lines[0])])

    def num_open(self, key: ShardKey) -> int:
        return len(self._shards[key].pending)

    def sweep(self) -> Swept:
        return self._trials.sweep()

    def record(self, swept: Swept) -> int:
        """Commit all that the sweep settled, in one transaction; how many lines."""
        found = [self._completed(completion) for completion in swept.completions]
        found += [self._blamed(key) for key in swept.blamed]
        results = [result for result in found if result is not None]
        self._settle(results)
        return len(results)

    def drop_ended(self) -> None:
        """Leave lines of batches that were cancelled, expired or ended otherwise."""
        running = self._running([shard.batch for shard in self._shards.values()])
        for shard in self._shards.values():
            if shard.batch.id not in running:
                self._drop_rows(shard)

    def drop(self, key: ShardKey) -> None:
        """Leave the shard as it is in the ledger; somebody will come for it again."""
        self._drop_rows(self._shards.pop(key))

    def pop_done(self) -> list[HeldShard]:
        """Shards with nothing left to do, marked done in the ledger unless given up."""
        done = [shard for shard in self._shards.values() if not shard.pending]
        for shard in done:
            if not shard.is_given_up:
                shard.is_last = self._ledger.lines.finish_shard(shard.batch.id, shard.index)
            del self._shards[shard.key]
        return done

    def _batch(self, batch_id: str) -> Batch:
        for shard in self._shards.values():
            if shard.batch.id == batch_id:
                return shard.batch  # a batch's counts are dear; nothing here looks at them
        return self._ledger.batches.get(batch_id)

    def _running(self, batches: Iterable[Batch]) -> set[str]:
        """Ids of those whose lines are still wanted."""
        now = time.time()
        in_time = {batch.id for batch in batches if batch.expires_at > now}
        statuses = self._ledger.batches.statuses(in_time)
        return {id_ for id_, status in statuses.items() if status is BatchStatus.IN_PROGRESS}

    def _render(self, batch: Batch, line: LineRecord, stream: BinaryIO) -> Prompt | ResultRecord:
        """The prompt, or the line's result if it cannot run."""
        stream.seek(line.offset_bytes)
        raw = stream.read(line.num_bytes)
        request, _ = parse_request_line(raw, line=line.index, endpoint=batch.endpoint)
        if request is None:
            log.error("a validated line is none any more", batch_id=batch.id, line_index=line.index)
            return _server_error(batch, line)
        try:
            prompt = self._renderer.prompt(batch, line.index, request.body)
            self._engine.check(prompt)
        except PromptError as error:
            refusal: RequestError = InvalidRequestError(
                str(error), param=error.param, code=error.code
            )
        except RequestError as error:
            refusal = error
        else:
            return prompt
        return refused_result(batch.id, line, status_code=400, error=error_body(refusal))

    def _drop_rows(self, shard: HeldShard) -> None:
        for index in shard.pending:
            self._trials.cancel(row_key(shard.batch.id, index))
            del self._shard_of[row_key(shard.batch.id, index)]
        shard.pending = {}
        shard.is_given_up = True

    def _find(self, key: str) -> tuple[Batch, LineRecord] | None:
        shard = self._shard_of.get(key)
        if shard is None:
            return None  # dropped meanwhile
        return shard.batch, shard.pending[parse_row_key(key)[1]]

    def _completed(self, completion: Completion) -> ResultRecord | None:
        found = self._find(completion.key)
        if found is None:
            return None
        batch, line = found
        return completed_result(
            batch.id,
            line,
            body=response_body(batch, line.index, completion),
            input_tokens=completion.num_prompt_tokens,
            output_tokens=completion.num_generated,
        )

    def _blamed(self, key: str) -> ResultRecord | None:
        found = self._find(key)
        if found is None:
            return None
        batch, line = found
        log.error("a line breaks the engine", batch_id=batch.id, line_index=line.index)
        return _server_error(batch, line)

    def _settle(self, results: list[ResultRecord]) -> None:
        if not results:
            return
        self._ledger.lines.record(results)
        for result in results:
            shard = self._shard_of.pop(row_key(result.batch_id, result.line_index))
            del shard.pending[result.line_index]


def _server_error(batch: Batch, line: LineRecord) -> ResultRecord:
    """The result of a line that the user is not to blame for."""
    error = {
        "message": "The server had an error while processing this request.",
        "type": "server_error",
        "param": None,
        "code": "server_error",
    }
    return refused_result(batch.id, line, status_code=500, error=error)
