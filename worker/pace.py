"""How fast the engine goes now, noted in the ledger every few seconds for whoever waits."""

import collections
import math
import time
from collections.abc import Callable
from typing import Final

from jobs.ledger.progress import Pace, ProgressRecords
from worker.model import Engine, Replanner

_EVERY_S: Final = 5.0
_MARKS: Final = 7
"""A rate is told over the time of so many notes: a sweep of prompts alone is no pace."""


class PaceMeter:
    """Of one engine, busy period by busy period."""

    def __init__(
        self,
        records: ProgressRecords,
        *,
        model_id: str,
        engine: Engine,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._records = records
        self._model_id = model_id
        self._engine = engine
        self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=_MARKS)
        self._noted_at = -math.inf

    def begin(self) -> None:
        """What was idle before says nothing of the pace."""
        self._marks.clear()
        self._mark()
        self._noted_at = -math.inf

    def note(self, replanner: Replanner | None) -> None:
        """After a sweep; the first one's pace is told at once."""
        if self._clock() - self._noted_at < _EVERY_S:
            return
        self._mark()
        (began_at, before), (now, generated) = self._marks[0], self._marks[-1]
        predicted = None if replanner is None else replanner.predicted_tokens_per_s
        self._records.note_pace(
            self._model_id,
            Pace(
                tokens_per_s=(generated - before) / max(now - began_at, 1e-6),
                predicted_tokens_per_s=predicted,
            ),
        )
        self._noted_at = now

    def _mark(self) -> None:
        self._marks.append((self._clock(), self._engine.report().generated_tokens))
