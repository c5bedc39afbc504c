"""The ledger: legal moves only, one winner, first results, derived counts, exact pages."""

import itertools
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from jobs.batch import (
    NEXT_STATUSES,
    BatchStatus,
    ExpiryPolicy,
    LineFault,
    RequestCounts,
    TokenUsage,
)
from jobs.errors import InvalidRequestError, LedgerError, NotFoundError
from jobs.file import File, Purpose, new_file_id
from jobs.ledger.batches import counting
from jobs.ledger.database import Database
from jobs.ledger.ledger import Ledger, Model, delete_unreferenced_blobs
from jobs.ledger.tables import SCHEMA_VERSION, schema
from jobs.line import LineRecord, Outcome, ResultRecord, unrun_result
from jobs.stores.base import FileStore
from jobs.stores.folder import FolderStore
from tests.support.records import batch_record

S = BatchStatus

PATHS = {
    S.VALIDATING: (),
    S.FAILED: (S.FAILED,),
    S.IN_PROGRESS: (S.IN_PROGRESS,),
    S.FINALIZING: (S.IN_PROGRESS, S.FINALIZING),
    S.COMPLETED: (S.IN_PROGRESS, S.FINALIZING, S.COMPLETED),
    S.EXPIRED: (S.EXPIRED,),
    S.CANCELLING: (S.CANCELLING,),
    S.CANCELLED: (S.CANCELLING, S.CANCELLED),
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state' / 'ledger.db'}"


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    ledger = Ledger.open(url)
    yield ledger
    ledger.close()


def add_batch(ledger: Ledger, status: BatchStatus = S.VALIDATING) -> str:
    batch = batch_record(metadata={"k": "é"}, output_expires_after=ExpiryPolicy(seconds=3_600))
    ledger.batches.add(batch)
    for step in PATHS[status]:
        assert ledger.batches.advance(batch.id, step)
    return batch.id


def line(index: int, *, shard_size: int = 2) -> LineRecord:
    return LineRecord(
        index=index,
        custom_id=f"r{index}",
        offset_bytes=10 * index,
        num_bytes=10,
        num_prompt_tokens=3,
        shard_index=index // shard_size,
    )


def result(batch_id: str, index: int, outcome: Outcome, row: str = "{}") -> ResultRecord:
    return ResultRecord(
        batch_id=batch_id,
        line_index=index,
        outcome=outcome,
        row=row,
        input_tokens=5,
        cached_tokens=1,
        output_tokens=2,
    )


def begin(ledger: Ledger, batch_id: str, num_lines: int = 5) -> None:
    found = [line(index) for index in range(num_lines)]
    assert ledger.lines.begin(batch_id, model="m", found=found, refused=[])


@pytest.mark.parametrize(("now", "to"), list(itertools.product(S, S)))
def test_only_the_moves_of_the_table_are_made(
    ledger: Ledger, now: BatchStatus, to: BatchStatus
) -> None:
    batch_id = add_batch(ledger, now)
    before = ledger.batches.get(batch_id)
    is_legal = to in NEXT_STATUSES[now]
    assert ledger.batches.advance(batch_id, to) is is_legal
    after = ledger.batches.get(batch_id)
    if not is_legal:
        assert after == before
    else:
        assert after.status is ledger.batches.status(batch_id) is to
        assert getattr(after, f"{to}_at") >= int(time.time()) - 5


def test_final_statuses_are_those_without_a_way_out() -> None:
    assert {status for status in S if status.is_final} == {
        S.COMPLETED,
        S.FAILED,
        S.EXPIRED,
        S.CANCELLED,
    }


def test_a_batch_comes_back_as_it_was_added(ledger: Ledger) -> None:
    batch = ledger.batches.get(add_batch(ledger))
    assert batch.metadata == {"k": "é"}
    assert batch.output_expires_after == ExpiryPolicy(seconds=3_600)
    assert (batch.status, batch.created_at, batch.errors) == (S.VALIDATING, 100, ())
    assert batch.request_counts == RequestCounts()


def test_faults_are_kept_with_a_failed_batch(ledger: Ledger) -> None:
    batch_id = add_batch(ledger)
    faults = (LineFault(code="c", message="m", line=2, param="p"), LineFault(code="d", message="n"))
    assert ledger.batches.advance(batch_id, S.FAILED, errors=faults)
    assert ledger.batches.get(batch_id).errors == faults


def test_of_two_advances_at_once_exactly_one_wins(ledger: Ledger) -> None:
    for _ in range(10):
        batch_id = add_batch(ledger, S.IN_PROGRESS)
        start = threading.Barrier(2)
        won: list[BatchStatus] = []

        def race(
            to: BatchStatus,
            batch_id: str = batch_id,
            start: threading.Barrier = start,
            won: list[BatchStatus] = won,
        ) -> None:
            start.wait()
            if ledger.batches.advance(batch_id, to):
                won.append(to)

        threads = [threading.Thread(target=race, args=(to,)) for to in (S.FINALIZING, S.CANCELLING)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [ledger.batches.status(batch_id)]


def test_begin_writes_nothing_if_the_batch_moved_meanwhile(ledger: Ledger) -> None:
    batch_id = add_batch(ledger, S.CANCELLING)
    assert not ledger.lines.begin(batch_id, model="m", found=[line(0)], refused=[])
    assert ledger.batches.get(batch_id).request_counts.total == 0
    assert ledger.batches.status(batch_id) is S.CANCELLING


def test_begin_is_all_or_nothing(ledger: Ledger) -> None:
    def broken() -> Iterator[LineRecord]:
        yield from (line(index) for index in range(3_000))
        raise RuntimeError("lost")

    batch_id = add_batch(ledger)
    with pytest.raises(RuntimeError, match="lost"):
        ledger.lines.begin(batch_id, model="m", found=broken(), refused=[])
    batch = ledger.batches.get(batch_id)
    assert (batch.status, batch.request_counts.total) == (S.VALIDATING, 0)
    begin(ledger, batch_id)
    assert ledger.batches.get(batch_id).request_counts.total == 5


def test_the_first_result_of_a_line_stays_and_is_counted_once(ledger: Ledger) -> None:
    batch_id = add_batch(ledger)
    begin(ledger, batch_id)
    ledger.lines.record([result(batch_id, 0, Outcome.COMPLETED, "first")])
    ledger.lines.record(
        [result(batch_id, 0, Outcome.FAILED, "second"), result(batch_id, 1, Outcome.FAILED)]
    )
    batch = ledger.batches.get(batch_id)
    assert batch.request_counts == RequestCounts(total=5, completed=1, failed=1)
    assert batch.usage == TokenUsage(input_tokens=10, cached_tokens=2, output_tokens=4)
    assert list(ledger.lines.rows(batch_id, [Outcome.COMPLETED])) == ["first"]


def test_counting_reads_the_index_and_no_rows_text(url: str) -> None:
    database = Database.open(url)
    with database.reading() as connection:
        asked = counting("batch_x").compile(connection, compile_kwargs={"literal_binds": True})
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked}").all()
    database.close()
    assert ["COVERING INDEX results_by_outcome" in step.detail for step in plan] == [True]


def test_cancelled_and_expired_lines_are_in_the_total_only(ledger: Ledger) -> None:
    batch_id = add_batch(ledger)
    begin(ledger, batch_id)
    ledger.lines.record([result(batch_id, 3, Outcome.COMPLETED)])
    assert ledger.batches.advance(batch_id, S.CANCELLING)
    ledger.lines.settle_rest(batch_id, Outcome.CANCELLED)
    assert ledger.lines.is_settled(batch_id)
    assert ledger.batches.advance(batch_id, S.CANCELLED, output_file_id="file-o")
    batch = ledger.batches.get(batch_id)
    assert batch.request_counts == RequestCounts(total=5, completed=1, failed=0)
    assert (batch.output_file_id, batch.error_file_id) == ("file-o", None)


def test_counts_of_an_ended_batch_are_frozen(ledger: Ledger) -> None:
    batch_id = add_batch(ledger)
    begin(ledger, batch_id)
    assert ledger.batches.advance(batch_id, S.EXPIRED)
    before = ledger.batches.get(batch_id)
    ledger.lines.record([result(batch_id, 0, Outcome.COMPLETED)])
    assert ledger.batches.get(batch_id) == before


def test_rows_come_in_input_order_whatever_order_they_came_in(ledger: Ledger) -> None:
    batch_id = add_batch(ledger)
    begin(ledger, batch_id, num_lines=1_200)
    for start in (600, 0):
        ledger.lines.record(
            [
                result(batch_id, index, Outcome.COMPLETED, str(index))
                for index in range(start + 599, start - 1, -1)
            ]
        )
    rows = list(ledger.lines.rows(batch_id, [Outcome.COMPLETED]))
    assert rows == [str(index) for index in range(1_200)]


def test_shards_are_queued_some_ahead_and_the_last_one_settles(ledger: Ledger) -> None:
    batch_id = add_batch(ledger)
    begin(ledger, batch_id)
    assert ledger.ranks.waiting() == []  # of no model that is served
    ledger.models.serve(Model(id="m", created_at=1, max_context_tokens=1))
    assert ledger.ranks.waiting() == [[[batch_id]]]
    assert ledger.lines.queue_shards(batch_id, ahead=2) == [0, 1]
    assert ledger.lines.queue_shards(batch_id, ahead=2) == []
    assert ledger.lines.finish_shards([(batch_id, 0)]) == set()
    assert ledger.lines.queue_shards(batch_id, ahead=2) == [2]
    assert ledger.lines.queued_shards(batch_id) == [1, 2]
    assert ledger.ranks.waiting() == []
    assert ledger.lines.finish_shards([(batch_id, 2)]) == set()
    assert ledger.lines.finish_shards([(batch_id, 1)]) == {batch_id}


def test_unsettled_lines_of_a_shard_are_those_without_a_result(ledger: Ledger) -> None:
    batch_id = add_batch(ledger)
    begin(ledger, batch_id)
    ledger.lines.record([unrun_result(batch_id, line(2), Outcome.EXPIRED)])
    assert ledger.lines.unsettled(batch_id, 1) == [line(3)]
    assert ledger.lines.unsettled(batch_id, 9) == []


def test_batches_page_newest_first(ledger: Ledger) -> None:
    made = [add_batch(ledger) for _ in range(5)]
    first = ledger.batches.page(limit=2)
    assert [batch.id for batch in first.items] == made[:2:-1]
    assert first.has_more
    rest = ledger.batches.page(limit=3, after=made[3])
    assert [batch.id for batch in rest.items] == made[2::-1]
    assert not rest.has_more
    with pytest.raises(InvalidRequestError, match="after"):
        ledger.batches.page(limit=1, after="batch_none")


def add_file(ledger: Ledger, purpose: Purpose, *, expires_at: int | None = None) -> str:
    file = File(
        id=new_file_id(),
        purpose=purpose,
        filename="f",
        num_bytes=2**40,
        created_at=1,
        expires_at=expires_at,
    )
    ledger.files.add(file)
    return file.id


def test_files_page_by_order_and_purpose_and_past_deleted_ones(ledger: Ledger) -> None:
    made = [add_file(ledger, Purpose.BATCH) for _ in range(4)]
    other = add_file(ledger, Purpose.EVALS)
    ledger.files.delete(made[1])
    ascending = ledger.files.page(limit=2, order="asc", after=made[1])
    assert [file.id for file in ascending.items] == made[2:]
    assert ascending.has_more
    only = ledger.files.page(limit=1, purpose="evals", after=None)
    assert [file.id for file in only.items] == [other]
    assert not only.has_more
    with pytest.raises(NotFoundError):
        ledger.files.delete(made[1])


def test_expired_files_are_gone_and_due_for_sweeping_once(ledger: Ledger) -> None:
    old = add_file(ledger, Purpose.BATCH, expires_at=2)
    add_file(ledger, Purpose.BATCH, expires_at=int(time.time()) + 1_000)
    with pytest.raises(NotFoundError, match=old):
        ledger.files.get(old)
    assert ledger.files.expired() == [old]
    ledger.files.forget(old)
    assert ledger.files.expired() == []


def test_one_model_is_served_and_keeps_its_birthday(ledger: Ledger) -> None:
    ledger.models.serve(Model(id="a", created_at=1, max_context_tokens=8))
    ledger.models.serve(Model(id="a", created_at=9, max_context_tokens=8))
    assert ledger.models.get("a").created_at == 1
    ledger.models.serve(Model(id="b", created_at=2, max_context_tokens=8))
    assert [model.id for model in ledger.models.all()] == ["b"]
    with pytest.raises(NotFoundError, match="'a' does not exist"):
        ledger.models.get("a")


def test_everything_is_there_after_reopening(url: str) -> None:
    first = Ledger.open(url)
    batch_id = add_batch(first)
    first.close()
    second = Ledger.open(url)
    assert second.batches.get(batch_id).id == batch_id
    second.close()


def test_a_newer_schema_is_refused_with_both_versions(url: str) -> None:
    database = Database.open(url)
    with database.writing() as connection:
        connection.execute(update(schema).values(version=SCHEMA_VERSION + 1))
    database.close()
    with pytest.raises(LedgerError, match=f"version {SCHEMA_VERSION + 1}.*knows {SCHEMA_VERSION}"):
        Ledger.open(url)


def test_a_ledger_that_cannot_be_opened_is_a_ledger_error(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")


@pytest.mark.parametrize("url", ["ledger.db", "postgresql://me:secret@host:port/x", ""])
def test_a_malformed_url_is_a_ledger_error_without_its_password(url: str) -> None:
    with pytest.raises(LedgerError, match="URL cannot be read; write it like") as refusal:
        Ledger.open(url)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_a_missing_driver_is_a_ledger_error_that_says_what_to_install(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(LedgerError, match=r"pip install 'psycopg\[binary\]'") as refusal:
        Ledger.open(f"{scheme}://me:secret@localhost/x")
    assert "secret" not in str(refusal.value)


def test_an_unknown_kind_of_ledger_is_a_ledger_error() -> None:
    with pytest.raises(LedgerError, match=r"cannot be opened: .*nosuch"):
        Ledger.open("nosuch://localhost/x")


def put(store: FileStore, *names: str) -> None:
    for name in names:
        with store.write(name) as stream:
            stream.write(b"x")


def test_blobs_that_no_record_stands_for_are_swept_and_no_others(
    ledger: Ledger, tmp_path: Path
) -> None:
    store = FolderStore.open(tmp_path / "files")
    live, deleted = (add_file(ledger, Purpose.BATCH) for _ in range(2))
    expired = add_file(ledger, Purpose.BATCH, expires_at=2)
    ledger.files.delete(deleted)
    running = [f"input-{add_batch(ledger, status)}" for status in S if not status.is_final]
    ended = [f"input-{add_batch(ledger, status)}" for status in S if status.is_final]
    orphans = [deleted, *ended, "file-unrecorded", "input-batch_unrecorded"]
    put(store, live, expired, *running, *orphans)
    before = set(store.names())
    assert delete_unreferenced_blobs(ledger, store, older_than_s=60) == 0
    assert set(store.names()) == before
    assert delete_unreferenced_blobs(ledger, store, older_than_s=-60) == len(orphans)
    assert set(store.names()) == {live, expired, *running}


def test_a_new_ledger_sweeps_nothing_of_an_older_one(ledger: Ledger, tmp_path: Path) -> None:
    store = FolderStore.open(tmp_path / "files")
    put(store, "file-of-another-ledger")
    assert delete_unreferenced_blobs(ledger, store, older_than_s=-60) == 0
    later = int(time.time()) + 60
    ledger.files.add(
        File(
            id=new_file_id(),
            purpose=Purpose.BATCH,
            filename="f",
            num_bytes=1,
            created_at=later,
            expires_at=None,
        )
    )
    assert delete_unreferenced_blobs(ledger, store, older_than_s=-60) == 0
    assert list(store.names()) == ["file-of-another-ledger"]
