"""Inputs that are read and outputs that are written, by loops that die and take over."""

from __future__ import annotations

import gzip
import json

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models import batch_holds, batches, jobs, submit
from models import files as stored_files
from models.database import db_now
from models.tables import Batch, Outbox, StoredFile
from models.views import batch_view
from tests.models.conftest import PERMANENT
from tests.worker.queue.conftest import Files, jsonl, let_holds_run_out
from visq import points
from visq.types import BatchRequest, BatchStatus


def test_a_file_becomes_items_and_its_output_is_in_input_order(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(5))
    batch_id = files.submit(metadata={"for": "test"})
    assert files.batch(batch_id).status is BatchStatus.VALIDATING
    files.run()
    batch = files.batch(batch_id)
    assert (batch.status, batch.total, batch.intake_done) == (BatchStatus.IN_PROGRESS, 5, True)

    items = files.items(batch_id)
    for job in reversed(items[1:]):
        files.world.succeed(job.id, text=f"answer to {job.custom_id}")
    files.world.finish(files.world.claimed(items[0].id), PERMANENT)
    assert files.batch(batch_id).status is BatchStatus.FINALIZING
    files.run()

    view = batch_view(files.batch(batch_id))
    assert view.status is BatchStatus.COMPLETED
    assert view.finished_at is not None
    written = files.lines("s3://data/out.jsonl")
    assert [line["custom_id"] for line in written] == [f"item-{n}" for n in range(5)]
    assert [line["status"] for line in written] == ["failed"] + ["succeeded"] * 4
    assert written[1]["result"]["text"] == "answer to item-1"
    [wrong] = files.lines("s3://data/out.errors.jsonl")
    assert (wrong["custom_id"], wrong["error"]["code"]) == ("item-0", "image_not_found")
    summary = json.loads(files.get("s3://data/out.summary.json"))
    assert summary["counts"] == {
        "total": 5,
        "succeeded": 4,
        "failed": 1,
        "cancelled": 0,
        "expired": 0,
    }
    assert (summary["status"], summary["metadata"]) == ("completed", {"for": "test"})


def test_packed_input_and_output(files: Files) -> None:
    files.put("s3://data/in.jsonl.gz", gzip.compress(jsonl(3)))
    batch_id = files.submit(input_uri="s3://data/in.jsonl.gz", output_uri="s3://data/out.jsonl.gz")
    files.run()
    files.succeed_all(batch_id)
    files.run()
    lines = gzip.decompress(files.get("s3://data/out.jsonl.gz")).splitlines()
    assert [json.loads(line)["custom_id"] for line in lines] == ["item-0", "item-1", "item-2"]


def test_a_file_that_breaks_off_stops_what_was_read_of_it(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_reading.CHUNK", 100)
    noise = [{"custom_id": str(n), "prompt": f"{n * 7919 % 10007} " * 20} for n in range(1000)]
    packed = gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in noise))
    files.put("s3://data/in.jsonl", packed[: len(packed) // 2])
    batch_id = files.submit(output_uri=None)
    files.run()
    batch = files.batch(batch_id)
    assert (batch.status, batch.intake_done) == (BatchStatus.CANCELLING, True)
    assert 0 < batch.total < 1000
    while due := files.world.database.read(batches.to_cancel, 500):
        for job_id in due:
            files.world.database.run(jobs.cancel, job_id)
    view = batch_view(files.batch(batch_id))
    assert view.status is BatchStatus.FAILED
    assert view.counts.cancelled == batch.total


class Killed(BaseException):
    """In place of ``kill -9``: nothing catches it on the way."""


@pytest.mark.parametrize(
    "point", ["batch.chunk_read", "batch.chunk_added", "transaction.committing"]
)
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_reader_that_dies_anywhere_is_followed_by_one_that_adds_each_item_once(
    files: Files, point: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_reading.CHUNK", 3)
    files.put("s3://data/in.jsonl", jsonl(10))
    batch_id = files.submit()
    seen = 0

    def strike(reached: str) -> None:
        nonlocal seen
        seen += reached == point
        if reached == point and seen == after:
            raise Killed

    points.listen(strike)
    try:
        with pytest.raises(Killed):
            files.run()
    finally:
        points.listen(None)
    held = files.batch(batch_id).held_until
    if held is not None:
        assert not files.loop().round() or point == "transaction.committing", "it is still held"
    files.world.database.run(let_holds_run_out)
    files.run()
    assert [job.custom_id for job in files.items(batch_id)] == [f"item-{n}" for n in range(10)]
    assert [job.position for job in files.items(batch_id)] == list(range(10))
    assert files.batch(batch_id).total == 10


def test_a_reader_that_was_held_up_writes_nothing_when_another_has_taken_over(
    files: Files,
) -> None:
    files.put("s3://data/in.jsonl", jsonl(4))
    batch_id = files.submit()
    database = files.world.database
    slow = database.run(batch_holds.take, seconds=30)
    assert slow is not None
    database.run(let_holds_run_out)
    files.run()
    with pytest.raises(batch_holds.HoldLostError):
        files.loop()._read(slow)
    assert len(files.items(batch_id)) == 4


def test_an_input_that_is_replaced_while_it_is_read_is_not_mixed_with_the_old_one(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_reading.CHUNK", 2)
    monkeypatch.setattr("worker.queue.batch_loop.TURN_SECONDS", -1.0)
    files.put("s3://data/in.jsonl", jsonl(6))
    batch_id = files.submit(output_uri=None)
    files.put("s3://data/other.jsonl", jsonl(1))
    files.submit(input_uri="s3://data/other.jsonl", output_uri=None)  # it gives way to this one
    assert files.loop().round()
    files.put("s3://data/in.jsonl", jsonl(7, metadata={"other": "file"}))
    files.run()
    batch = files.batch(batch_id)
    assert batch.errors is not None
    assert batch.errors[0]["code"] == "object_changed"
    assert all(not job.meta for job in files.items(batch_id))


def test_large_batches_give_way_to_others_after_their_turn(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_reading.CHUNK", 2)
    monkeypatch.setattr("worker.queue.batch_loop.TURN_SECONDS", -1.0)
    files.put("s3://data/in.jsonl", jsonl(10))
    files.put("s3://data/small.jsonl", jsonl(1))
    large = files.submit()
    small = files.submit(input_uri="s3://data/small.jsonl", output_uri=None)
    loop = files.loop()
    assert loop.round()
    assert loop.round()
    assert files.batch(small).intake_done
    assert not files.batch(large).intake_done


def test_stop_cancels_what_has_not_ended_when_an_item_fails(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(4))
    batch_id = files.submit(on_item_error="stop", output_uri=None)
    files.run()
    first, *_ = files.items(batch_id)
    files.world.finish(files.world.claimed(first.id), PERMANENT)
    assert files.batch(batch_id).status is BatchStatus.CANCELLING
    for job_id in files.world.database.read(batches.to_cancel, 100):
        files.world.database.run(jobs.cancel, job_id)
    view = batch_view(files.batch(batch_id))
    assert (view.status, view.counts.cancelled) == (BatchStatus.FAILED, 3)
    assert view.errors is not None
    assert view.errors.data[0].code == "item_failed"


def test_cancelling_before_anything_was_read_ends_the_batch_at_once(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(2))
    batch_id = files.submit(output_uri=None)
    cancelled = files.world.database.run(batches.request_cancel, batch_id)
    assert cancelled.batch.status is BatchStatus.CANCELLED
    [event] = cancelled.events
    assert event.payload["type"] == "visq.batch.cancelled"
    files.run()
    assert files.items(batch_id) == []


def test_a_batch_whose_time_is_over_before_it_was_read_expires(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(2))
    batch_id = files.submit(expires_in=3600, output_uri=None)
    files.world.database.run(_expire, batch_id)
    files.run()
    assert files.batch(batch_id).status is BatchStatus.EXPIRED


def test_an_output_that_cannot_be_written_does_not_hold_up_the_end(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visq.errors import ObjectForbidden

    files.put("s3://data/in.jsonl", jsonl(1))
    batch_id = files.submit()
    files.run()
    files.succeed_all(batch_id)

    def refuse(*_: object) -> None:
        raise ObjectForbidden("the store refuses s3://data/out.jsonl")

    monkeypatch.setattr("worker.queue.batch_writing.BatchWriter.write", refuse)
    files.run()
    view = batch_view(files.batch(batch_id))
    assert (view.status, view.counts.succeeded) == (BatchStatus.FAILED, 1)
    assert view.errors is not None
    assert view.errors.data[0].code == "object_forbidden"


def test_one_event_tells_the_end_and_it_comes_after_those_of_the_items(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(2))
    batch_id = files.submit(result_queue="results")
    files.run()
    files.succeed_all(batch_id)
    before = files.world.database.read(_events)
    assert [kind for kind, _ in before] == ["result", "result"]
    loop = files.loop()
    hold = files.world.database.run(batch_holds.take, seconds=30)
    assert hold is not None
    loop._write(hold)
    batch = files.batch(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    depth = files.courier.broker._results.default_channel._size("visq.results.acme.results")
    assert depth == 1, "published at once"


def test_openai_lines_become_files_of_answers_and_of_errors(files: Files) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n in range(3)
    ]
    files.put(
        "s3://visq-uploads/acme/files/x",
        b"".join(json.dumps(line).encode() + b"\n" for line in lines),
    )
    request = BatchRequest(
        input_file_id="fil_" + "0" * 32,
        endpoint="/v1/chat/completions",
        completion_window="24h",
    )
    batch_id = files.world.database.run(
        submit.submit_batch,
        files.world.tenant_id,
        request,
        max_attempts=3,
        input_uri="s3://visq-uploads/acme/files/x",
    ).batch.id
    files.run()
    first, *others = files.items(batch_id)
    files.world.finish(files.world.claimed(first.id), PERMANENT)
    for job in others:
        files.world.succeed(job.id)
    files.run()
    batch = files.batch(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    output, errors = files.world.database.read(_files, batch.output_file_id, batch.error_file_id)
    assert output.size == len(files.get(output.uri))
    answered = files.lines(output.uri)
    assert [line["custom_id"] for line in answered] == ["r1", "r2"]
    assert answered[0]["response"]["body"]["object"] == "chat.completion"
    [failed] = files.lines(errors.uri)
    assert failed["custom_id"] == "r0"


def test_an_uploaded_file_without_an_endpoint_has_its_output_in_our_form(files: Files) -> None:
    uri = "s3://visq-uploads/acme/files/x"
    files.put(uri, jsonl(3))
    batch_id = files.world.database.run(
        submit.submit_batch,
        files.world.tenant_id,
        BatchRequest(input_file_id="fil_" + "0" * 32),
        max_attempts=3,
        input_uri=uri,
    ).batch.id
    files.run()
    files.world.finish(files.world.claimed(files.items(batch_id)[0].id), PERMANENT)
    files.succeed_all(batch_id)
    files.run()
    batch = files.batch(batch_id)
    output, errors = files.world.database.read(_files, batch.output_file_id, batch.error_file_id)
    answered = files.lines(output.uri)
    assert [line["position"] for line in answered] == [1, 2]
    assert {line["status"] for line in answered} == {"succeeded"}
    assert [line["status"] for line in files.lines(errors.uri)] == ["failed"]


def _expire(session: Session, batch_id: str) -> None:
    session.execute(update(Batch).where(Batch.id == batch_id).values(expires_at=db_now(-1.0)))


def _events(session: Session) -> list[tuple[str, str]]:
    rows = session.execute(select(Outbox.kind, Outbox.id).order_by(Outbox.id))
    return [(kind, id_) for kind, id_ in rows]


def _files(
    session: Session, output: str | None, errors: str | None
) -> tuple[StoredFile, StoredFile]:
    found = {row.id: row for row in session.scalars(select(StoredFile))}
    return found[str(output)], found[str(errors)]


def test_files_are_deleted_when_their_time_is_over(files: Files) -> None:
    database, tenant_id = files.world.database, files.world.tenant_id
    for name, seconds in (("old", 0.0), ("young", 3600.0), ("kept", None)):
        uri = f"s3://visq-uploads/acme/files/{name}"
        files.put(uri, b"x")
        database.run(
            stored_files.add,
            tenant_id,
            file_id=f"fil_{name}",
            filename=name,
            purpose="batch",
            uri=uri,
            size=1,
            expires_in=seconds,
        )
    files.loop().clear_files()
    left = files.store.list("visq-uploads", "acme/files/")
    assert [each.key for each in left] == ["acme/files/kept", "acme/files/young"]
    rows = database.read(stored_files.list_files, limit=10)
    assert sorted(row.filename for row in rows) == ["kept", "young"]
