"""Checklist 133 and 134: whoever wants to know of a batch's end is told, signed as OpenAI signs."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from sqlalchemy import select

from jobs.batch import BatchOptions, BatchStatus
from jobs.ledger.tables import webhook_deliveries
from jobs.networks import Networks
from jobs.webhook import Listener, Webhook, signed_headers
from tests.support.box import Box, completion_line
from tests.support.receiver import Receiver, receiving
from tests.support.service import Service
from worker.webhooks import WebhookSender

S = BatchStatus
SECRET = "whsec_RdvaYFYUXuIFuEbvZHwMfYFhUf7aMYjYcmM24+Aj40c="
OTHER_SECRET = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
LOOPBACK = Networks("127.0.0.0/8")
ENDS = {
    S.COMPLETED: [S.IN_PROGRESS, S.FINALIZING, S.COMPLETED],
    S.FAILED: [S.FAILED],
    S.EXPIRED: [S.EXPIRED],
    S.CANCELLED: [S.CANCELLING, S.CANCELLED],
}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def client() -> Iterator[OpenAI]:
    with OpenAI(api_key="any", webhook_secret=SECRET) as client:
        yield client


def ended(box: Box, status: BatchStatus = S.EXPIRED, webhook: Webhook | None = None) -> str:
    options = BatchOptions(webhook=webhook)
    batch_id = box.add([completion_line(0)], ring=False, options=options)
    for step in ENDS[status]:
        assert box.ledger.batches.advance(batch_id, step)
    return batch_id


def sender(box: Box, receiver: Receiver | None = None, **changed: Any) -> WebhookSender:
    """Tells all to the receiver, as the settings' own listener."""
    options: dict[str, Any] = {
        "installation": None if receiver is None else Webhook(url=receiver.url),
        "secret": SECRET,
        "networks": LOOPBACK,
        "every_s": 0.01,
        "first_wait_s": 0.0,
        "limit_s": 5.0,
    }
    return WebhookSender(box.ledger, **options | changed)


def num_due(box: Box) -> int:
    """Deliveries on record, be their next attempt now or later."""
    with box.ledger._database.reading() as connection:
        return len(connection.execute(select(webhook_deliveries.c.batch_id)).all())


@pytest.mark.parametrize("status", ENDS)
def test_133_each_end_is_told_and_verifies(
    box: Box, receiver: Receiver, client: OpenAI, status: BatchStatus
) -> None:
    batch_id = ended(box, status)
    sender(box, receiver).send_due()
    (heard,) = receiver.heard
    assert heard.path == "/hook?of=tests"
    assert heard.headers["content-type"] == "application/json"
    event = client.webhooks.unwrap(heard.body, heard.headers)
    assert event.type == f"batch.{status}"
    assert event.id.startswith("evt_")
    assert event.object == "event"
    assert event.created_at == getattr(box.batch(batch_id), f"{status}_at")
    assert event.data.model_dump() == {"id": batch_id}
    assert num_due(box) == 0


def test_133_what_was_altered_or_is_old_does_not_verify(
    box: Box, receiver: Receiver, client: OpenAI
) -> None:
    ended(box)
    sender(box, receiver).send_due()
    (heard,) = receiver.heard
    altered = heard.body.replace(b"batch.expired", b"batch.completed")
    with pytest.raises(InvalidWebhookSignatureError, match="does not match"):
        client.webhooks.unwrap(altered, heard.headers)
    with pytest.raises(InvalidWebhookSignatureError, match="does not match"):
        client.webhooks.unwrap(heard.body, heard.headers, secret=OTHER_SECRET)
    ended(box)
    (delivery,) = box.ledger.deliveries.due(limit=10)
    old = signed_headers(delivery, secret=SECRET, at=int(time.time()) - 301)
    with pytest.raises(InvalidWebhookSignatureError, match="too old"):
        client.webhooks.unwrap(delivery.body, old)


def test_133_a_batch_names_a_listener_of_its_own(service: Service, client: OpenAI) -> None:
    with receiving() as receiver:
        webhook = {"url": receiver.url, "secret": OTHER_SECRET}
        batch = service.run([completion_line(0)], extra_body={"webhook": webhook})
        assert batch.model_extra is not None
        assert batch.model_extra["webhook"] == {"url": receiver.url}
        service.box.until(lambda: receiver.heard)
    (heard,) = receiver.heard
    event = client.webhooks.unwrap(heard.body, heard.headers, secret=OTHER_SECRET)
    assert (event.type, event.data.model_dump()) == ("batch.completed", {"id": batch.id})


def test_133_both_listeners_are_told_with_one_event(box: Box, receiver: Receiver) -> None:
    with receiving() as own:
        ended(box, webhook=Webhook(url=own.url, secret=OTHER_SECRET))
        sender(box, receiver).send_due()
        assert own.heard[0].body == receiver.heard[0].body
        ids = {each.headers["webhook-id"] for each in (*own.heard, *receiver.heard)}
        assert len(ids) == 2
    assert num_due(box) == 0


def test_133_whom_nobody_named_nothing_is_kept_for(box: Box) -> None:
    ended(box)
    assert num_due(box) == 1
    sender(box).send_due()
    assert num_due(box) == 0


def test_134_other_answers_than_2xx_are_tried_again(box: Box, client: OpenAI) -> None:
    with (
        receiving() as elsewhere,
        receiving(statuses=(500, 307, 404, 204), location=elsewhere.url) as receiver,
    ):
        ended(box)
        told = sender(box, receiver)
        for num_tries in range(1, 5):
            assert num_due(box) == 1
            told.send_due()
            assert len(receiver.heard) == num_tries
        assert num_due(box) == 0
        assert elsewhere.heard == []  # a redirect is no address that was looked at
    assert len({heard.headers["webhook-id"] for heard in receiver.heard}) == 1
    assert len({heard.body for heard in receiver.heard}) == 1
    for heard in receiver.heard:
        client.webhooks.unwrap(heard.body, heard.headers)


def test_134_waits_grow_up_to_an_hour_and_end_after_three_days(
    box: Box, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = sender(box, receiver, first_wait_s=15.0)
    waits = [told._wait_s(num_tries) for num_tries in range(100)]
    assert all(15 * 2**n <= wait <= 20 * 2**n for n, wait in enumerate(waits[:7]))
    assert all(3_600 <= wait <= 4_500 for wait in waits[8:])
    ended(box)
    with receiving(statuses=(500,)) as refusing:
        sender(box, refusing).send_due()
        assert num_due(box) == 1
        later = time.time() + 3 * 86_400 + 1
        monkeypatch.setattr(time, "time", lambda: later)
        sender(box, refusing).send_due()
        assert len(refusing.heard) == 2
    assert num_due(box) == 0


def test_134_a_dead_receiver_delays_no_batch_and_nobody_else(service: Service) -> None:
    with receiving(is_deaf=True) as dead, receiving() as alive:
        hooks = [{"url": each.url, "secret": SECRET} for each in (dead, alive)]
        first = service.run([completion_line(0)], extra_body={"webhook": hooks[0]})
        service.box.until(lambda: dead.heard)
        second = service.run([completion_line(0)], extra_body={"webhook": hooks[1]})
        service.box.until(lambda: alive.heard)
        assert not dead.released.is_set()
    assert (first.status, second.status) == ("completed", "completed")


def test_134_an_attempt_that_was_killed_is_made_again(box: Box, receiver: Receiver) -> None:
    ended(box)
    (before,) = box.ledger.deliveries.due(limit=10)
    assert box.ledger.deliveries.begin_try(before, next_at=time.time())
    assert not box.ledger.deliveries.begin_try(before, next_at=time.time())  # somebody else's
    sender(box, receiver).send_due()
    assert [heard.headers["webhook-id"] for heard in receiver.heard] == [before.id]
    assert before.listener is Listener.INSTALLATION


def test_134_private_addresses_are_refused_when_they_are_called(
    box: Box, receiver: Receiver
) -> None:
    ended(box)
    for url in (receiver.url, receiver.url.replace("127.0.0.1", "localhost")):
        sender(box, networks=Networks(), installation=Webhook(url=url)).send_due()
    assert receiver.heard == []
    assert num_due(box) == 1


@pytest.mark.parametrize(
    ("webhook", "param", "code"),
    [
        ("https://example.com", "webhook", "invalid_type"),
        ({"secret": SECRET}, "webhook.url", "missing_required_parameter"),
        ({"url": "https://example.com"}, "webhook.secret", "missing_required_parameter"),
        ({"url": 5, "secret": SECRET}, "webhook.url", "invalid_type"),
        ({"url": "ftp://example.com", "secret": SECRET}, "webhook.url", "invalid_value"),
        ({"url": "https://u:p@example.com", "secret": SECRET}, "webhook.url", "invalid_value"),
        ({"url": "https://example.com:99999", "secret": SECRET}, "webhook.url", "invalid_value"),
        ({"url": "https://exam ple.com", "secret": SECRET}, "webhook.url", "invalid_value"),
        ({"url": "https://[::1", "secret": SECRET}, "webhook.url", "invalid_value"),
        ({"url": "http://169.254.169.254/", "secret": SECRET}, "webhook.url", "invalid_value"),
        ({"url": "http://[::ffff:10.0.0.1]/", "secret": SECRET}, "webhook.url", "invalid_value"),
        ({"url": "https://example.com", "secret": "s3cret"}, "webhook.secret", "invalid_value"),
        ({"url": "https://example.com", "to": 1}, "webhook.to", "unknown_parameter"),
    ],
)
def test_a_wrong_webhook_is_refused_by_name(
    service: Service, webhook: object, param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        service.submit([completion_line(0)], extra_body={"webhook": webhook})
    assert (refusal.value.param, refusal.value.code) == (param, code)
    assert "s3cret" not in str(refusal.value)


def test_the_thread_sends_until_it_is_stopped(box: Box, receiver: Receiver) -> None:
    thread = sender(box, receiver, first_wait_s=15.0)
    thread.start()
    with contextlib.ExitStack() as stack:
        stack.callback(thread.stop)
        ended(box)
        box.until(lambda: num_due(box) == 0)
    assert len(receiver.heard) == 1
