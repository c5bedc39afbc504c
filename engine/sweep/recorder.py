"""What is written down of a run as it happens: report, timeline and call log; decides nothing."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.compute.linear import ProductCounters
from engine.config import Completion, Prompt
from engine.memory.footprint import peak_bytes
from engine.memory.weights import WeightCounters
from engine.planning.ceilings import Ceilings
from engine.sweep.call_log import CallLog, LoggedRow
from engine.sweep.report import Report
from engine.sweep.rows import Row, Share
from engine.timeline import Timeline, Track


class Recorder:
    """Told of every call and sweep of one engine. Close it: the timeline and the log close too."""

    def __init__(
        self,
        *,
        policy_reason: str,
        ceilings: Ceilings,
        spill_dir: Path,
        timeline: Timeline,
        call_log: CallLog,
    ) -> None:
        self._report = Report(policy_reason=policy_reason, ceilings=ceilings)
        self._spill_dir = spill_dir
        self._timeline = timeline
        self._call_log = call_log
        self._num_tried = 0  # sweeps, those that raised among them

    def submitted(self, prompt: Prompt) -> None:
        num_tokens, max_tokens = len(prompt.token_ids), prompt.sampling.max_tokens
        self._call_log.submit(prompt.key, prompt_tokens=num_tokens, max_tokens=max_tokens)

    def cancelled(self, key: str) -> None:
        self._call_log.cancel(key)

    def preempted(self, row: Row) -> None:
        self._call_log.preempt(row.prompt.key, tokens=row.num_cached)

    @contextlib.contextmanager
    def sweeping(self, shares: Sequence[Share]) -> Iterator[None]:
        """Around one sweep, the rows' taking leave included; one that raises is no sweep."""
        self._num_tried += 1
        self._call_log.sweep(self._num_tried, [_logged(share) for share in shares])
        started_s = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self._call_log.raised(self._num_tried, error)
            raise
        ended_s = time.perf_counter()
        name = f"sweep {self._num_tried}"
        self._timeline.add(Track.SWEEP, name, started_s=started_s, ended_s=ended_s)
        self._report.num_sweeps += 1
        self._report.sweep_s += ended_s - started_s

    def swept(
        self,
        shares: Sequence[Share],
        *,
        num_generated: int,
        completions: Sequence[Completion],
        pages_in_use: int,
    ) -> None:
        """What the sweep just noted has brought: `shares` as the rows are after it."""
        report = self._report
        report.generated_tokens += num_generated
        report.prompt_tokens += sum(map(_num_prompt_tokens, shares))
        report.completions += len(completions)
        report.sweeps_by_rows[len(shares)] = report.sweeps_by_rows.get(len(shares), 0) + 1
        for done in completions:
            self._call_log.finish(done.key, reason=done.finish_reason, tokens=done.num_generated)
        self._timeline.count("rows in the block", len(shares))
        self._timeline.count("pages in use", pages_in_use)
        self._timeline.flush()

    def policy_adopted(self, reason: str) -> None:
        self._report.policy_reason = reason

    def gemm_chosen(self, reason: str) -> None:
        self._report.gemm_reason = reason

    def report(
        self,
        weights: WeightCounters,
        products: ProductCounters,
        *,
        preempted_rows: int,
        shared_tokens: int,
    ) -> Report:
        """A copy, as of now."""
        return dataclasses.replace(
            self._report,
            sweeps_by_rows=dict(self._report.sweeps_by_rows),
            preempted_rows=preempted_rows,
            shared_tokens=shared_tokens,
            weights_streamed_bytes=weights.streamed_bytes,
            weights_fetched_s=weights.fetched_s,
            weights_waited_s=weights.waited_s,
            products_s=products.taken_s,
            totals=self._timeline.totals(),
            idle_s=self._timeline.idle_s(),
            peak_bytes=peak_bytes(self._spill_dir),
        )

    def close(self) -> None:
        self._timeline.close()
        self._call_log.close()


def _logged(share: Share) -> LoggedRow:
    row = share.row
    segment = share.segment(0)
    return LoggedRow(row.prompt.key, row.index, segment.past, share.num_tokens, share.samples)


def _num_prompt_tokens(share: Share) -> int:
    """How many of the tokens that the share has just brought to the cache are its prompt's."""
    if share.prefix is not None:
        return share.num_tokens
    cached = share.row.num_cached
    return max(0, min(cached, len(share.row.prompt.token_ids)) - (cached - share.num_tokens))
