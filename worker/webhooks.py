"""Sends what the ledger says is due to listeners, and tries again for three days; holds nobody up.

Knows deliveries and their signatures; nothing of what ended the batches.
"""

import asyncio
import random
import threading
import time
from typing import Final

import h11
import structlog

from jobs.ledger.ledger import Ledger
from jobs.networks import Networks
from jobs.webhook import Delivery, Listener, Webhook, signed_headers
from worker.http_post import post

log: Final = structlog.get_logger(__name__)
_LIMIT_S: Final = 10.0  # of one attempt, whole
_AT_ONCE: Final = 32
_MAX_WAIT_S: Final = 3_600.0
_GIVE_UP_S: Final = 3 * 86_400.0


class WebhookSender:
    """A daemon thread of its own over a ledger handle of its own, until stopped.

    `installation` is who is told of every batch. `first_wait_s` passes before the second attempt,
    then twice as much each time, up to an hour; it must outlast `limit_s`, which one may take.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        installation: Webhook | None,
        secret: str | None,
        networks: Networks,
        every_s: float,
        first_wait_s: float = 15.0,
        limit_s: float = _LIMIT_S,
    ) -> None:
        self._ledger = ledger
        self._installation = installation
        self._secret = secret
        self._networks = networks
        self._every_s = every_s
        self._first_wait_s = first_wait_s
        self._limit_s = limit_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is being said is said again later by whoever comes next."""
        self._stopped.set()
        self._thread.join(timeout=self._every_s)

    def send_due(self) -> None:
        """One attempt of each that is due, and their ends awaited."""
        asyncio.run(self._send_due())

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        """Who answers late holds up no other: attempts are begun, not awaited."""
        sending: set[asyncio.Task[None]] = set()
        while not self._stopped.is_set():
            sending = {each for each in sending if not each.done()}
            try:
                sending |= await self._begin(_AT_ONCE - len(sending))
            except Exception as error:  # noqa: BLE001 - without this thread nobody is told anything
                log.warning("webhooks failed, trying again", error=repr(error))
            await asyncio.to_thread(self._stopped.wait, self._every_s)

    async def _send_due(self) -> None:
        await asyncio.gather(*await self._begin(_AT_ONCE))

    async def _begin(self, limit: int) -> set[asyncio.Task[None]]:
        due = await asyncio.to_thread(self._ledger.deliveries.due, limit=limit)
        return {asyncio.create_task(self._guarded(delivery)) for delivery in due}

    async def _guarded(self, delivery: Delivery) -> None:
        try:
            await self._send(delivery)
        except Exception as error:  # noqa: BLE001 - the ledger, say: it is due again later
            log.warning("a webhook failed", batch_id=delivery.batch_id, error=repr(error))

    async def _send(self, delivery: Delivery) -> None:
        webhook = delivery.webhook
        if delivery.listener is Listener.INSTALLATION:
            webhook = self._installation
        if webhook is None:  # nobody wants to know
            await asyncio.to_thread(self._ledger.deliveries.end, delivery)
            return
        next_at = time.time() + self._wait_s(delivery.num_tries)
        begin_try = self._ledger.deliveries.begin_try
        if not await asyncio.to_thread(begin_try, delivery, next_at=next_at):
            return
        problem = await self._attempt(delivery, webhook)
        told = {
            "batch_id": delivery.batch_id,
            "webhook_event": delivery.event,
            "listener": delivery.listener,
            "num_tries": delivery.num_tries + 1,
        }
        if problem is None:
            log.info("webhook delivered", **told)
        elif next_at - delivery.created_at > _GIVE_UP_S:
            log.error("webhook given up", problem=problem, **told)
        else:
            log.warning("webhook not delivered, trying again", problem=problem, **told)
            return
        await asyncio.to_thread(self._ledger.deliveries.end, delivery)

    async def _attempt(self, delivery: Delivery, webhook: Webhook) -> str | None:
        """What went wrong, if anything did. The address is not told: it may hold a token."""
        secret = webhook.secret or self._secret
        if secret is None:
            return "there is no secret to sign with"
        headers = signed_headers(delivery, secret=secret, at=int(time.time()))
        headers["User-Agent"] = "freight"
        try:
            status = await post(
                webhook.url,
                headers=headers,
                body=delivery.body,
                networks=self._networks,
                limit_s=self._limit_s,
            )
        except (OSError, ValueError, h11.ProtocolError) as error:
            return repr(error)
        return None if 200 <= status < 300 else f"status {status}"

    def _wait_s(self, num_tries: int) -> float:
        wait_s = min(_MAX_WAIT_S, self._first_wait_s * 2.0 ** min(num_tries, 16))
        return wait_s * random.uniform(1.0, 1.25)  # noqa: S311 - so that they do not all come at once
