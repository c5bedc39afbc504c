"""A caller's view of the ledger: its tenant's records, no others', and its limits kept in a race."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.batch import Batch, BatchStatus
from jobs.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    QuotaError,
    RateLimitError,
)
from jobs.file import File, Purpose, new_file_id
from jobs.ledger.batches import IdempotencyKey
from jobs.ledger.ledger import Ledger
from jobs.tenant import DEFAULT_TENANT, Caller, Limits
from jobs.upload import Part, Upload, UploadStatus, new_part_id, new_upload_id
from tests.support.records import batch_record

LATER = 2**31 - 1


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def view(ledger: Ledger, tenant: str, **limits: int) -> Ledger:
    return ledger.seen_by(Caller(tenant=tenant, limits=Limits(**limits)))


def file(num_bytes: int = 1) -> File:
    return File(
        id=new_file_id(),
        purpose=Purpose.BATCH,
        filename="f",
        num_bytes=num_bytes,
        created_at=1,
        expires_at=None,
    )


def upload(num_bytes: int = 10) -> Upload:
    return Upload(
        id=new_upload_id(),
        purpose=Purpose.BATCH,
        filename="f",
        mime_type="t",
        num_bytes=num_bytes,
        created_at=1,
        expires_at=LATER,
        file_lifetime_s=None,
    )


def part(upload: Upload, num_bytes: int = 1) -> Part:
    return Part(id=new_part_id(), upload_id=upload.id, num_bytes=num_bytes, created_at=1)


def batch(created_at: int = LATER) -> Batch:
    return batch_record(created_at=created_at, expires_at=LATER)


def test_the_whole_ledger_sees_all_and_each_view_its_own(ledger: Ledger) -> None:
    one, other = view(ledger, "one"), view(ledger, "other")
    found = file()
    one.files.add(found)
    assert one.files.get(found.id) == dataclasses.replace(found, tenant="one")
    assert ledger.files.get(found.id).tenant == "one"
    assert [item.id for item in one.files.page(limit=9, after=None).items] == [found.id]
    assert other.files.page(limit=9, after=None).items == []
    for refused in (lambda: other.files.get(found.id), lambda: other.files.delete(found.id)):
        with pytest.raises(NotFoundError):
            refused()
    with pytest.raises(InvalidRequestError):
        other.files.page(limit=9, after=found.id)
    one.files.delete(found.id)


def test_what_is_added_without_a_caller_is_what_it_says_or_the_default_tenants(
    ledger: Ledger,
) -> None:
    said, silent = dataclasses.replace(file(), tenant="one"), file()
    ledger.files.add(said)
    ledger.files.add(silent)
    assert view(ledger, "one").files.get(said.id).tenant == "one"
    assert view(ledger, DEFAULT_TENANT).files.get(silent.id).tenant == DEFAULT_TENANT


def test_a_stranger_moves_no_batch(ledger: Ledger) -> None:
    made = batch()
    assert view(ledger, "one").batches.add(made)
    other = view(ledger, "other")
    assert not other.batches.advance(made.id, BatchStatus.CANCELLING)
    for refused in (lambda: other.batches.get(made.id), lambda: other.batches.status(made.id)):
        with pytest.raises(NotFoundError):
            refused()
    assert other.batches.with_status(list(BatchStatus)) == []
    assert other.batches.statuses([made.id]) == {}
    assert other.batches.page(limit=9).items == []
    assert ledger.batches.status(made.id) is BatchStatus.VALIDATING
    assert view(ledger, "one").batches.advance(made.id, BatchStatus.CANCELLING)


def test_a_stranger_adds_to_no_upload_and_ends_none(ledger: Ledger) -> None:
    one, other, begun = view(ledger, "one"), view(ledger, "other"), upload()
    one.uploads.add(begun)
    sent = part(begun)
    one.uploads.add_part(sent)
    with pytest.raises(NotFoundError):
        other.uploads.get(begun.id)
    with pytest.raises(NotFoundError):
        other.uploads.add_part(part(begun))
    assert other.uploads.parts(begun.id) == {}
    assert not other.uploads.cancel(begun.id)
    assert not other.uploads.complete(begun.id, part_ids=[sent.id], file=file())
    assert one.uploads.get(begun.id).status is UploadStatus.PENDING
    made = file()
    assert one.uploads.complete(begun.id, part_ids=[sent.id], file=made)
    assert one.files.get(made.id).tenant == "one"


def test_two_tenants_may_give_two_batches_one_name(ledger: Ledger) -> None:
    one, other = view(ledger, "one"), view(ledger, "other")
    made = {name: batch() for name in ("one", "other")}
    key = IdempotencyKey(key="k", digest="d")
    assert one.batches.add(made["one"], key=key)
    assert other.batches.of_key(key) is None
    assert other.batches.add(made["other"], key=key)
    assert not other.batches.add(batch(), key=key)
    assert one.batches.of_key(key) == one.batches.get(made["one"].id)
    assert other.batches.of_key(key) == other.batches.get(made["other"].id)
    with pytest.raises(ConflictError):
        one.batches.of_key(IdempotencyKey(key="k", digest="another"))


def test_a_batch_remembers_how_many_lines_its_key_allowed(ledger: Ledger) -> None:
    made = batch()
    view(ledger, "one", enqueued_lines=7).batches.add(made)
    found = ledger.batches.get(made.id)
    assert (found.tenant, found.max_enqueued_lines) == ("one", 7)


def test_bytes_count_while_they_are_kept(ledger: Ledger) -> None:
    tight = view(ledger, "one", stored_bytes=10)
    first, begun = file(4), upload(6)
    tight.files.add(first)
    tight.uploads.add(begun)
    tight.uploads.add_part(part(begun, 6))
    with pytest.raises(QuotaError, match=r"10 bytes are stored, 1 more .* limit is 10 bytes"):
        tight.files.check_room()
    with pytest.raises(QuotaError):
        tight.uploads.add_part(part(begun, 1))
    with pytest.raises(QuotaError):
        tight.uploads.add(upload(1))
    view(ledger, "other", stored_bytes=10).files.add(file(10))
    tight.uploads.cancel(begun.id)
    tight.files.add(file(6))
    tight.files.delete(first.id)
    tight.files.add(file(4))


def test_a_view_without_limits_is_not_held_up(ledger: Ledger) -> None:
    free = view(ledger, "one")
    for _ in range(3):
        free.files.add(file(2**50))
        assert free.batches.add(batch())


def in_a_race(num_threads: int, attempt: Callable[[], object]) -> int:
    """How many of them were let through."""
    start, through = threading.Barrier(num_threads), []

    def run() -> None:
        start.wait()
        try:
            attempt()
        except RateLimitError:
            return
        through.append(1)

    threads = [threading.Thread(target=run) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(through)


def test_limits_hold_when_all_ask_at_once(ledger: Ledger) -> None:
    tight = view(ledger, "one", batches_per_hour=3, stored_bytes=30)
    assert in_a_race(12, lambda: tight.batches.add(batch())) == 3
    assert in_a_race(12, lambda: tight.files.add(file(10))) == 3


def test_the_hour_ends_for_each_batch_by_itself(ledger: Ledger) -> None:
    now = int(time.time())
    tight = view(ledger, "one", batches_per_hour=2)
    assert tight.batches.add(batch(created_at=now - 3_000))
    assert tight.batches.add(batch(created_at=now))
    with pytest.raises(RateLimitError) as refusal:
        tight.batches.add(batch(created_at=now))
    assert refusal.value.retry_after_s is not None
    assert 590 <= refusal.value.retry_after_s <= 600
    old = view(ledger, "two", batches_per_hour=2)
    for age_s in (3_601, 10):
        assert old.batches.add(batch(created_at=now - age_s))
    assert old.batches.add(batch(created_at=now))
