"""Riders through real processes: killed workers, lost bells, bodies that break or kill, full queues."""

import contextlib
import dataclasses
import json
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from rq.job import Job

from jobs.batch import Endpoint
from jobs.ledger.ledger import Model
from jobs.rider import Rider, new_party_id, new_rider_id
from server.app import create_app
from tests.support.box import MODEL, Box, completion_line
from tests.support.fake_engine import LETHAL, POISON, FakeEngine, FakeTokenizer
from tests.support.server import serving
from worker.accumulator import Accumulator
from worker.deaths import Deaths, Suspicion
from worker.reconcile import reconcile
from worker.render import Origin, Rendered, Renderer

Answer = Future[httpx2.Response]


class Asking:
    """Asks completions of a server, as many at once as may be."""

    def __init__(self, box: Box, url: str, pool: ThreadPoolExecutor) -> None:
        self._box = box
        self._url = f"{url}/v1/completions"
        self._pool = pool

    def __call__(self, prompt: object = "x", **body: Any) -> Answer:
        asked = {"model": MODEL, "prompt": prompt, "max_tokens": 2, **body}
        return self._pool.submit(httpx2.post, self._url, json=asked, timeout=120)

    def connection(self, **body: Any) -> socket.socket:
        """Asks, and waits no longer than it is open."""
        asked = json.dumps({"model": MODEL, "prompt": "x", **body}).encode()
        parts = urlsplit(self._url)
        found = socket.create_connection((str(parts.hostname), parts.port or 0))
        head = f"POST {parts.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(asked)}\r\n\r\n"
        found.sendall(head.encode() + asked)
        return found

    def num_waiting(self) -> int:
        riders = self._box.ledger.riders
        return sum(len(riders.waiting(party_id)) for party_id in riders.parties())


@contextlib.contextmanager
def asking_of(box: Box) -> Iterator[Asking]:
    box.ledger.models.serve(Model(id=MODEL, created_at=1, max_context_tokens=256))
    with serving(create_app(box.settings)) as url, ThreadPoolExecutor(16) as pool:
        yield Asking(box, url, pool)


@pytest.fixture
def asking(box: Box) -> Iterator[Asking]:
    with asking_of(box) as asking:
        yield asking


def text_of(answer: Answer) -> str:
    response = answer.result()
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_riders_of_a_worker_that_was_killed_or_stopped_are_run_again(
    box: Box, asking: Asking
) -> None:
    with box.running("worker", sweep_s=0.05) as killed:
        answers = [asking(f"p{index}", max_tokens=100) for index in range(3)]
        box.until(lambda: len(box.submitted()) == 3)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    with box.running("worker", sweep_s=0.05) as stopped:
        box.until(lambda: len(box.submitted()) == 6)
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(10) == 0
    assert len(box.queue) > 0
    assert asking.num_waiting() == 3
    with box.running("worker"):
        assert [len(text_of(answer)) for answer in answers] == [100] * 3
    runs = [sorted(box.submitted()[at : at + 3]) for at in (0, 3, 6)]
    assert runs[0] == runs[1] == runs[2]


def test_a_bell_that_was_lost_is_rung_again_and_no_report_is_left(box: Box, asking: Asking) -> None:
    answer = asking()
    box.until(lambda: len(box.queue) == 1)
    box.redis.flushall()
    with box.running("intake"), box.running("worker"):
        assert len(text_of(answer)) == 2
        box.wait(box.add([completion_line(0)]))
        box.until(box.reports)
    (report,) = box.reports()
    assert (report["num_batches"], report["num_settled_lines"]) == (1, 1)
    assert "num_answered_riders=1" in (box.settings.state_dir / "worker.log").read_text()


def test_a_rider_that_kills_the_process_gets_a_500(box: Box) -> None:
    box.settings = dataclasses.replace(box.settings, lease_s=1)
    with asking_of(box) as asking:
        answer = asking([1, LETHAL])
        box.until(lambda: len(box.queue) == 1)
        (job_id,) = box.queue.job_ids
        # As if four processes had died over it, the last of them alone with it.
        Deaths(box.redis).hold(job_id, Suspicion(at_once=1), num_lines=1)
        with box.running("worker") as worker:
            assert worker.wait(30) == -signal.SIGKILL
        other = asking("y")
        with box.running("worker") as worker:
            response = answer.result()
            assert len(text_of(other)) == 2
            assert worker.poll() is None
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert response.headers["x-should-retry"] == "false"


def test_a_poisonous_rider_gets_a_500_and_one_whose_client_goes_away_leaves(
    box: Box, asking: Asking
) -> None:
    answers = [asking([1, index]) for index in range(2, 6)]
    box.until(lambda: asking.num_waiting() == 4)
    # Rung for last, and so tried first: the others' sweeps then show that the engine works. Tried
    # last it would end the process, and be blamed by the next.
    bad = asking([1, POISON])
    box.until(lambda: asking.num_waiting() == 5)
    with box.running("worker", sweep_s=0.02) as worker:
        assert [len(text_of(answer)) for answer in answers] == [2] * 4
        assert bad.result().status_code == 500
        num_cancelled, num_submitted = len(box.calls("cancel")), len(box.submitted())
        with asking.connection(max_tokens=200):
            box.until(lambda: len(box.submitted()) > num_submitted)
        box.until(lambda: len(box.calls("cancel")) > num_cancelled)
        assert len(text_of(asking())) == 2
        assert worker.poll() is None
    assert len(box.calls("finish")) == 5


def test_riders_wait_for_no_batch_and_no_window(box: Box) -> None:
    box.settings = dataclasses.replace(box.settings, accumulation_window_s=600.0)
    options = {"block_rows": 4, "sweep_s": 0.02}
    with asking_of(box) as asking, box.running("intake"), box.running("worker", **options):
        assert len(text_of(asking())) == 2
        batch_id = box.add([completion_line(index, max_tokens=20) for index in range(200)])
        box.until(lambda: box.num_settled(batch_id) > 4)
        before = box.num_settled(batch_id)
        assert len(text_of(asking(max_tokens=1))) == 1
        # The rows that ran then, and few of the 64 that were on the queue or claimed.
        assert box.num_settled(batch_id) <= before + 5 * 4
        box.cancel(batch_id)
        box.wait(batch_id)


# -- without processes -------------------------------------------------------------------------


class _OddRenderer(Renderer):
    """Raises what no caller expects, for one prompt."""

    def render(self, origin: Origin, line_index: int, body: Mapping[str, Any]) -> Rendered:
        if body["prompt"] == "odd":
            raise ValueError("a number nobody thought of")
        return super().render(origin, line_index, body)


def accumulator_of(box: Box) -> Accumulator:
    return Accumulator(
        engine=FakeEngine(),
        ledger=box.ledger,
        store=box.store,
        renderer=_OddRenderer(tokenizer=FakeTokenizer(), max_context_tokens=256),
        model_id=MODEL,
    )


def rider_of(prompt: str, *, model: str = MODEL, wait_s: float = 60) -> Rider:
    return Rider(
        id=new_rider_id(),
        endpoint=Endpoint.COMPLETIONS,
        model=model,
        body={"model": model, "prompt": prompt, "max_tokens": 1},
        expires_at=time.time() + wait_s,
    )


def test_one_that_cannot_be_rendered_harms_no_other_of_its_party(box: Box) -> None:
    party_id, accumulator = new_party_id(), accumulator_of(box)
    odd, gone, other, fine = (
        rider_of("odd"),
        rider_of("late", wait_s=-1),
        rider_of("x", model="another"),
        rider_of("fine"),
    )
    box.ledger.riders.exchange("s", arrived={party_id: [odd, gone, other, fine]})
    assert accumulator.riders.take((party_id, 0)) == 1
    assert accumulator.riders.record(accumulator.sweep()) == 1
    assert accumulator.riders.pop_done() == [(party_id, 0)]
    found = {each.rider_id: each for each in box.ledger.riders.exchange("s", arrived={})}
    assert {each: found[each].status_code for each in found} == {
        odd.id: 500,
        other.id: 404,
        fine.id: 200,
    }
    assert json.loads(found[other.id].body)["error"]["code"] == "model_not_found"


def test_what_a_dead_server_left_is_swept_away(box: Box) -> None:
    late, still = rider_of("late", wait_s=-100), rider_of("still")
    box.ledger.riders.exchange("dead", arrived={"party_a": [late], "party_b": [still]})
    reconcile(box.ledger, box.doorbell, box.store, shards_ahead=1)
    assert box.ledger.riders.remove_expired(grace_s=0) == 0
    assert [each.id for each in box.ledger.riders.waiting("party_b")] == [still.id]
    assert box.queue.job_ids == ["riders-party_b"]
    box.ledger.riders.remove_all_of("dead")
    assert box.ledger.riders.parties() == []


def test_parties_are_rung_ahead_of_shards(box: Box) -> None:
    box.doorbell.shard("batch_1", 0)
    box.doorbell.riders("party_1")
    box.doorbell.riders("party_1")
    assert box.queue.job_ids == ["riders-party_1", "shard-batch_1-0"]
    assert box.doorbell.missing_parties(["party_1", "party_2"]) == ["party_2"]
    job = Job.fetch("riders-party_1", connection=box.redis)
    assert job.args == ("party_1",)
    assert job.enqueue_at_front_on_retry


def test_a_riders_first_answer_stays_and_what_it_asked_is_forgotten(box: Box) -> None:
    rider = rider_of("nobody is to know")
    box.ledger.riders.exchange("s", arrived={"party_a": [rider]})
    accumulator = accumulator_of(box)
    accumulator.riders.take(("party_a", 0))
    accumulator.riders.record(accumulator.sweep())
    (first,) = box.ledger.riders.exchange("s", arrived={})
    box.ledger.riders.answer([dataclasses.replace(first, status_code=500)])
    assert box.ledger.riders.exchange("s", arrived={}) == [first]
    assert box.ledger.riders.exchange("another", arrived={}) == []
    assert box.ledger.riders.waiting("party_a") == []
    with contextlib.closing(sqlite3.connect(box.settings.state_dir / "ledger.db")) as database:
        assert "nobody is to know" not in "\n".join(database.iterdump())
    assert box.ledger.riders.exchange("s", arrived={}, left=[rider.id]) == []
