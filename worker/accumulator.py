"""Shards in, recorded lines out: what the worker holds of which batches, and what became of it.

Knows the ledger and the rows in the engine; nothing of the queue that the shards came by.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable
from typing import BinaryIO, Final

import structlog

from engine.config import Completion
from jobs.batch import Batch, BatchStatus
from jobs.errors import RequestError
from jobs.ledger.ledger import Ledger
from jobs.line import (
    LineRecord,
    ResultRecord,
    broken_result,
    completed_result,
    parse_request_line,
    refused_result,
)
from jobs.stores.base import FileStore
from worker.answering import BROKEN, UNFOLLOWED, Answerer, Gathering
from worker.model import Engine
from worker.render import Rendered, Renderer, error_body, parse_row_key
from worker.riders import Riders
from worker.trials import Swept, Trials

log: Final = structlog.get_logger(__name__)
ShardKey = tuple[str, int]
LinePlace = tuple[str, int]
"""A batch's id and a line's index."""


@dataclasses.dataclass(slots=True, kw_only=True)
class HeldShard:
    """A claimed shard and its lines without a result, those in the engine with what came of them.
    `is_given_up`: the ledger has to wait.
    """

    batch: Batch
    index: int
    pending: dict[int, LineRecord]
    gathered: dict[int, Gathering] = dataclasses.field(default_factory=dict)
    is_given_up: bool = False
    is_last: bool = False

    @property
    def key(self) -> ShardKey:
        return self.batch.id, self.index


class Accumulator:
    """`riders` share its rows."""

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
        self._shard_of: dict[LinePlace, HeldShard] = {}
        self._answerer = Answerer(renderer.tokenizer, fingerprint=engine.fingerprint)
        self.riders = Riders(
            engine=engine,
            trials=self._trials,
            ledger=ledger,
            renderer=renderer,
            answerer=self._answerer,
            model_id=model_id,
        )

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
            found = {line.index: self._render(batch, line, stream) for line in lines}
        # Only now: what cannot be rendered at all must not be held without a claim.
        shard.pending = {line.index: line for line in lines}
        self._shards[key] = shard
        self._shard_of |= {(batch_id, line.index): shard for line in lines}
        rendered = {at: each for at, each in found.items() if isinstance(each, Rendered)}
        shard.gathered = {at: Gathering(each) for at, each in rendered.items()}
        prompts = [prompt for each in rendered.values() for prompt in each.prompts]
        if at_once is None:
            for prompt in prompts:
                self._trials.submit(prompt, on_last_try=on_last_try)
        else:
            self._trials.submit_in_turn(prompts, at_once=at_once)
        self._settle([result for result in found.values() if isinstance(result, ResultRecord)])
        return len(rendered)

    def blame_first(self, key: ShardKey) -> None:
        """Settle the first open line of a shard that is not held: it ends every process."""
        batch = self._batch(key[0])
        lines = self._ledger.lines.unsettled(*key)
        if lines and batch.id in self._running([batch]):
            log.error("a line ends the process", batch_id=batch.id, line_index=lines[0].index)
            self._ledger.lines.record([broken_result(batch.id, lines[0], message=BROKEN)])

    def num_open(self, key: ShardKey) -> int:
        return len(self._shards[key].pending)

    def sweep(self) -> Swept:
        return self._trials.sweep()

    def record(self, swept: Swept) -> int:
        """Commit all that the sweep settled, in one transaction; how many lines."""
        found = [self._completed(completion) for completion in swept.completions]
        found += [self._blamed(key) for key in dict.fromkeys(map(_line_of, swept.blamed))]
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
        kept = [shard for shard in done if not shard.is_given_up]
        settled = self._ledger.lines.finish_shards([shard.key for shard in kept])
        last = {shard.batch.id: shard for shard in kept}
        for batch_id in settled:
            last[batch_id].is_last = True
        for shard in done:
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

    def _render(self, batch: Batch, line: LineRecord, stream: BinaryIO) -> Rendered | ResultRecord:
        """The prompts, or the line's result if it cannot run."""
        stream.seek(line.offset_bytes)
        raw = stream.read(line.num_bytes)
        request, _ = parse_request_line(raw, line=line.index, endpoint=batch.endpoint)
        if request is None:
            log.error("a validated line is none any more", batch_id=batch.id, line_index=line.index)
            return broken_result(batch.id, line, message=BROKEN)
        try:
            return self._renderer.render_for(self._engine, batch, line.index, request.body)
        except RequestError as error:
            return refused_result(batch.id, line, status_code=400, error=error_body(error))

    def _drop_rows(self, shard: HeldShard) -> None:
        for gathering in shard.gathered.values():
            self._cancel(gathering)
        for index in shard.pending:
            del self._shard_of[shard.batch.id, index]
        shard.pending, shard.gathered = {}, {}
        shard.is_given_up = True

    def _cancel(self, gathering: Gathering) -> None:
        for prompt in gathering.rendered.prompts:
            self._trials.cancel(prompt.key)

    def _completed(self, completion: Completion) -> ResultRecord | None:
        """The line's result, if this was its last completion."""
        batch_id, line_index = _line_of(completion.key)
        shard = self._shard_of.get((batch_id, line_index))  # None: dropped meanwhile
        if shard is None or not shard.gathered[line_index].add(completion):
            return None
        gathering, line = shard.gathered[line_index], shard.pending[line_index]
        if gathering.is_faulty:
            return broken_result(batch_id, line, message=UNFOLLOWED)
        body = self._answerer.body(shard.batch, line_index, gathering)
        return completed_result(batch_id, line, body=body, usage=gathering.usage)

    def _blamed(self, place: LinePlace) -> ResultRecord | None:
        batch_id, line_index = place
        shard = self._shard_of.get(place)
        if shard is None:
            return None
        log.error("a line breaks the engine", batch_id=batch_id, line_index=line_index)
        self._cancel(shard.gathered[line_index])  # its other prompts
        return broken_result(batch_id, shard.pending[line_index], message=BROKEN)

    def _settle(self, results: list[ResultRecord]) -> None:
        if not results:
            return
        self._ledger.lines.record(results)
        for result in results:
            shard = self._shard_of.pop((result.batch_id, result.line_index))
            del shard.pending[result.line_index]
            shard.gathered.pop(result.line_index, None)


def _line_of(key: str) -> LinePlace:
    batch_id, line_index, _ = parse_row_key(key)
    return batch_id, line_index
