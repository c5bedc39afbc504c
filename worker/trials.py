"""The rows in the engine, and who is to blame when a sweep raises; knows no batches and no lines.

After a raise the rows of the block are tried again in halves, each half apart, down to the row
that raises alone, twice. It is blamed once another sweep has shown that the engine itself works.
"""

import dataclasses
from collections import Counter
from typing import Final

import structlog

from engine.config import Completion, Prompt
from engine.errors import EngineError
from worker.model import Engine

log: Final = structlog.get_logger(__name__)
_TRIES_ALONE: Final = 2


class EngineBrokenError(EngineError):
    """The engine raises whatever it is given: this process cannot go on."""


class EngineDeadError(EngineBrokenError):
    """The engine cannot even be told to leave its rows: a GPU that has met an error computes nothing
    more in this process. Which row it was, only other processes can find out.
    """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What one sweep settled: rows that finished, and keys of rows found to break the engine."""

    completions: list[Completion]
    blamed: list[str]


class Trials:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[str, Prompt] = {}
        self._num_missing: Counter[str] = Counter()  # rows of a running prompt
        self._groups: list[list[Prompt]] = []  # groups to be run apart, the next one last
        self._later: list[Prompt] = []  # arrived during the trials
        self._suspects: list[str] = []  # raised alone, no proof yet that others do not
        self._tries_alone: Counter[str] = Counter()
        self._on_last_try: set[str] = set()

    @property
    def num_rows(self) -> int:
        return len(self._running) + sum(map(len, self._groups)) + len(self._later)

    def submit(self, prompt: Prompt, *, on_last_try: bool = False) -> None:
        """`on_last_try`: a process has already ended over this row's shard."""
        if on_last_try:
            self._on_last_try.add(prompt.key)
        if self._on_trial():
            self._later.append(prompt)
        else:
            self._enter([prompt])

    def submit_in_turn(self, prompts: list[Prompt], *, at_once: int) -> None:
        """So many at a time, in this order. Processes have ended over them: nothing else may be in."""
        assert not self.num_rows
        starts = range(0, len(prompts), at_once)
        self._groups = [prompts[start : start + at_once] for start in reversed(starts)]
        self._on_last_try |= {prompt.key for prompt in prompts}

    def cancel(self, key: str) -> None:
        self._engine.cancel(key)
        self._running.pop(key, None)
        self._num_missing.pop(key, None)
        for rows in (*self._groups, self._later):
            rows[:] = [prompt for prompt in rows if prompt.key != key]
        self._suspects = [suspect for suspect in self._suspects if suspect != key]
        self._on_last_try.discard(key)

    def sweep(self) -> Swept:
        """One pass over all layers. Raises EngineBrokenError when no row can be blamed, and
        EngineDeadError when none can be tried again.
        """
        self._enter_next_trial()
        if not self._running:
            return Swept(completions=[], blamed=self._blame_unproven())
        try:
            completions = self._engine.sweep()
        except Exception as error:  # noqa: BLE001 - whatever it is, some row or the engine is to blame
            log.warning("a sweep raised", num_rows=len(self._running), error=repr(error))
            self._split(error)
            return Swept(completions=[], blamed=[])
        for completion in completions:
            self._note_end(completion.key)
        blamed, self._suspects = self._suspects, []
        return Swept(completions=completions, blamed=blamed)

    def _on_trial(self) -> bool:
        return bool(self._groups or self._suspects or self._later)

    def _enter(self, prompts: list[Prompt]) -> None:
        for prompt in prompts:
            self._engine.submit(prompt)
            self._running[prompt.key] = prompt
            self._num_missing[prompt.key] = prompt.sampling.n

    def _note_end(self, key: str) -> None:
        self._num_missing[key] -= 1
        if self._num_missing[key] <= 0:
            self._running.pop(key, None)
            del self._num_missing[key]
            self._on_last_try.discard(key)

    def _enter_next_trial(self) -> None:
        while not self._running and self._groups:
            self._enter(self._groups.pop())
        if not self._running:  # the trials are over
            later, self._later = self._later, []
            self._enter(later)

    def _split(self, error: Exception) -> None:
        group = list(self._running.values())
        try:
            for prompt in group:
                self._engine.cancel(prompt.key)
        except Exception as failure:  # noqa: BLE001 - whatever it says
            raise EngineDeadError(f"the engine is dead: {error!r}, then {failure!r}") from error
        self._running.clear()
        self._num_missing.clear()
        if len(group) > 1:
            half = len(group) // 2
            self._groups += [group[half:], group[:half]]
            return
        key = group[0].key
        self._tries_alone[key] += 1
        if self._tries_alone[key] < _TRIES_ALONE:
            self._groups.append(group)
            return
        self._suspects.append(key)
        if len(self._suspects) > 1:
            raise EngineBrokenError(f"the engine raises for every row: {error!r}") from error

    def _blame_unproven(self) -> list[str]:
        """Nothing else is left to try. A row over which a process has ended before is to blame."""
        suspects, self._suspects = self._suspects, []
        if not self._on_last_try.issuperset(suspects):
            raise EngineBrokenError("the engine raised for its last row, and no other can tell why")
        return suspects
