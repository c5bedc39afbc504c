"""Riders in, recorded answers out: the requests outside batches that this worker holds.

They share rows and sweeps with the lines of batches, and are rendered and answered as those are. They
come by parties, as lines come by shards; who waits no longer leaves the block.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

import structlog

from engine.config import Completion
from jobs.errors import RequestError
from jobs.ledger.ledger import Ledger, no_model
from jobs.line import broken_error
from jobs.rider import Rider, RiderAnswer
from worker.answering import BROKEN, UNFOLLOWED, Answerer, Gathering
from worker.carrier import JobKey
from worker.render import Checker, Rendered, Renderer, error_body, parse_row_key
from worker.trials import Swept, Trials

log: Final = structlog.get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    rider: Rider
    party: JobKey
    gathering: Gathering


class Riders:
    """`trials` are the rows of lines too."""

    def __init__(
        self,
        *,
        engine: Checker,
        trials: Trials,
        ledger: Ledger,
        renderer: Renderer,
        answerer: Answerer,
        model_id: str,
    ) -> None:
        self._engine = engine
        self._trials = trials
        self._ledger = ledger
        self._renderer = renderer
        self._answerer = answerer
        self._model_id = model_id
        self._parties: dict[JobKey, set[str]] = {}  # ids of those that are open
        self._held: dict[str, _Held] = {}

    @property
    def num_held(self) -> int:
        return len(self._held)

    def take(self, key: JobKey, *, at_once: int | None = None, on_last_try: bool = False) -> int:
        """Put the party's waiting riders into the block, all or so many at a time; how many."""
        found = [(each, self._render(each)) for each in self._ledger.riders.waiting(key[0])]
        refused = [each for _, each in found if isinstance(each, RiderAnswer)]
        self._ledger.riders.answer(refused)
        rendered = [(rider, each) for rider, each in found if isinstance(each, Rendered)]
        self._parties[key] = {rider.id for rider, _ in rendered}
        for rider, each in rendered:
            self._held[rider.id] = _Held(rider=rider, party=key, gathering=Gathering(each))
        prompts = [
            dataclasses.replace(prompt, goes_first=True)
            for _, each in rendered
            for prompt in each.prompts
        ]
        if at_once is None:
            for prompt in prompts:
                self._trials.submit(prompt, on_last_try=on_last_try)
        else:
            self._trials.submit_in_turn(prompts, at_once=at_once)
        return len(rendered)

    def blame_first(self, key: JobKey) -> None:
        """Answer the first open rider of a party that is not held: it ends every process."""
        for rider in self._ledger.riders.waiting(key[0])[:1]:
            log.error("a rider ends the process", rider_id=rider.id)
            self._ledger.riders.answer([_broken(rider.id, BROKEN)])

    def num_open(self, key: JobKey) -> int:
        return len(self._parties[key])

    def record(self, swept: Swept) -> int:
        """Commit all that the sweep settled, in one transaction; how many riders."""
        found = [self._completed(completion) for completion in swept.completions]
        found += [self._blamed(rider_id) for rider_id in _ids(swept.blamed)]
        answers = [answer for answer in found if answer is not None]
        self._ledger.riders.answer(answers)
        for answer in answers:
            held = self._held.pop(answer.rider_id)
            self._parties[held.party].discard(answer.rider_id)
        return len(answers)

    def drop_ended(self) -> None:
        """Leave riders that nobody waits for: their client is gone, or their time is over."""
        if not self._held:
            return
        waiting = self._ledger.riders.still_waiting([party_id for party_id, _ in self._parties])
        for rider_id in self._held.keys() - waiting:
            self._drop_rows(rider_id)

    def drop(self, key: JobKey) -> None:
        """Leave the party as it is in the ledger; somebody will come for it again."""
        for rider_id in list(self._parties[key]):
            self._drop_rows(rider_id)
        del self._parties[key]

    def pop_done(self) -> list[JobKey]:
        """Parties with nothing left to do."""
        done = [key for key, open_ids in self._parties.items() if not open_ids]
        for key in done:
            del self._parties[key]
        return done

    def _render(self, rider: Rider) -> Rendered | RiderAnswer:
        """The prompts, or the rider's answer if it cannot run."""
        if rider.model != self._model_id:  # another one was served when it came
            return _refused(rider.id, 404, error_body(no_model(rider.model)))
        try:
            return self._renderer.render_for(self._engine, rider, 0, rider.body)
        except RequestError as error:
            return _refused(rider.id, 400, error_body(error))
        except Exception as error:  # noqa: BLE001 - the others of its party are not to blame
            log.warning("a rider is not rendered", rider_id=rider.id, error=type(error).__name__)
            return _broken(rider.id, BROKEN)

    def _completed(self, completion: Completion) -> RiderAnswer | None:
        """The rider's answer, if this was its last completion."""
        held = self._held.get(parse_row_key(completion.key)[0])
        if held is None or not held.gathering.add(completion):
            return None
        if held.gathering.is_faulty:
            return _broken(held.rider.id, UNFOLLOWED)
        body = self._answerer.body(held.rider, 0, held.gathering)
        return RiderAnswer(rider_id=held.rider.id, status_code=200, body=json.dumps(body))

    def _blamed(self, rider_id: str) -> RiderAnswer | None:
        held = self._held.get(rider_id)
        if held is None:
            return None
        log.error("a rider breaks the engine", rider_id=rider_id)
        self._cancel(held.gathering)  # its other prompts
        return _broken(rider_id, BROKEN)

    def _drop_rows(self, rider_id: str) -> None:
        held = self._held.pop(rider_id)
        self._parties[held.party].discard(rider_id)
        self._cancel(held.gathering)

    def _cancel(self, gathering: Gathering) -> None:
        for prompt in gathering.rendered.prompts:
            self._trials.cancel(prompt.key)


def _ids(row_keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(parse_row_key(key)[0] for key in row_keys))


def _refused(rider_id: str, status_code: int, error: Mapping[str, Any]) -> RiderAnswer:
    body = json.dumps({"error": error})
    return RiderAnswer(rider_id=rider_id, status_code=status_code, body=body)


def _broken(rider_id: str, message: str) -> RiderAnswer:
    return _refused(rider_id, 500, broken_error(message))
