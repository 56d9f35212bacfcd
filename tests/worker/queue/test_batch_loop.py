"""Inputs that are read and outputs that are written, by loops that die and take over."""

from __future__ import annotations

import gzip
import json

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from models import batch_holds, batch_windows, batches, dispatch, jobs, reading, submit
from models import files as stored_files
from models.database import db_now
from models.tables import Batch, Outbox, StoredFile
from models.views import batch_view
from tests.models.conftest import PERMANENT
from tests.worker.queue.conftest import Files, jsonl, let_holds_run_out
from visq import points
from visq.types import BatchRequest, BatchStatus
from visq.types import JobStatus as S


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


def test_a_wrong_line_is_a_failed_item_and_the_others_run(files: Files) -> None:
    broken = b'{"custom_id": "b", "prompt": \n{"prompt": "no id"}\n{"custom_id": "item-1"}\n'
    files.put("s3://data/in.jsonl", jsonl(2) + broken + jsonl(1))
    batch_id = files.submit()
    files.run()
    items = files.items(batch_id)
    assert [(job.position, job.status, job.error_code) for job in items] == [
        (0, S.QUEUED, None),
        (1, S.QUEUED, None),
        (2, S.FAILED, "malformed_body"),
        (3, S.FAILED, "invalid_request"),
        (4, S.FAILED, "invalid_request"),
        (5, S.FAILED, "duplicate_custom_id"),
    ]
    assert "line 3" in str(items[2].error_message)
    assert files.batch(batch_id).failed == 4
    files.succeed_all(batch_id)
    files.run()
    view = batch_view(files.batch(batch_id))
    assert (view.status, view.counts.succeeded) == (BatchStatus.COMPLETED, 2)
    assert [line["position"] for line in files.lines("s3://data/out.errors.jsonl")] == [2, 3, 4, 5]


def test_what_is_a_wrong_line_cannot_be_retried(files: Files) -> None:
    files.put("s3://data/in.jsonl", b"{}\n" + jsonl(1))
    batch_id = files.submit()
    files.run()
    with pytest.raises(Exception, match="asks nothing that can be done"):
        files.world.database.run(jobs.retry, files.items(batch_id)[0].id)


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (b"", "batch_input_invalid", "nothing"),
        (b"\n\n", "batch_input_invalid", "nothing"),
        (None, "object_not_found", "in.jsonl"),
        (b"\x89PNG\r\n\x1a\n\0\0", "batch_input_invalid", "binary"),
        (jsonl(2).decode().encode("utf-16"), "batch_input_invalid", "UTF-16"),
        (gzip.compress(jsonl(2), mtime=0)[:-9], "batch_input_invalid", "cut off"),
    ],
)
def test_an_input_that_cannot_be_read_fails_the_batch(
    files: Files, data: bytes | None, code: str, said: str
) -> None:
    if data is not None:
        files.put("s3://data/in.jsonl", data)
    batch_id = files.submit(output_uri=None)
    files.run()
    view = batch_view(files.batch(batch_id))
    assert (view.status, view.counts.total) == (BatchStatus.FAILED, 0)
    assert view.errors is not None
    [error] = view.errors.data
    assert error.code == code
    assert said in error.message


def test_a_file_of_more_lines_than_are_taken_fails_the_batch(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(5))
    files.settings = files.settings.model_copy(update={"max_batch_items": 4})
    batch_id = files.submit(output_uri=None)
    files.run()
    batch = files.batch(batch_id)
    assert batch.errors is not None
    assert "VISQ_MAX_BATCH_ITEMS" in batch.errors[0]["message"]
    files.put("s3://data/in.jsonl", jsonl(4))
    fits = files.submit(output_uri=None)
    files.run()
    assert files.batch(fits).total == 4


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


def test_images_under_a_prefix_are_items_in_the_order_of_their_names(files: Files) -> None:
    for name in ("b.png", "a.jpg", "deep/c.JPEG", "notes.txt"):
        files.put(f"s3://data/photos/{name}", b"x")
    batch_id = files.submit(input_uri="s3://data/photos/", prompt="describe", output_uri=None)
    files.run()
    items = files.items(batch_id)
    assert [job.custom_id for job in items] == ["a.jpg", "b.png", "deep/c.JPEG"]
    [message] = items[0].request["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert message["content"][0]["image_url"]["url"] == "s3://data/photos/a.jpg"


def test_a_data_url_becomes_an_upload(files: Files) -> None:
    image = "data:image/png;base64,iVBORw0KGgo="
    files.put("s3://data/in.jsonl", jsonl(2, images=[image]))
    batch_id = files.submit()
    files.run()
    urls = {
        job.request["messages"][0]["content"][0]["image_url"]["url"]
        for job in files.items(batch_id)
    }
    [url] = urls
    assert url.startswith("s3://visq-uploads/acme/")
    assert files.get(url) == b"\x89PNG\r\n\x1a\n"


def test_another_tenants_uploads_and_sessions_are_not_there(files: Files) -> None:
    other = files.world.another_tenant("other")
    theirs = other.submit(session={}).session_id
    lines = [
        {"custom_id": "a", "prompt": "x", "session_id": theirs},
        {"custom_id": "b", "prompt": "x", "images": ["s3://visq-uploads/other/" + "0" * 64]},
    ]
    files.put("s3://data/in.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    batch_id = files.submit()
    files.run()
    assert [job.error_code for job in files.items(batch_id)] == ["not_found", "image_forbidden"]


def test_turns_of_a_session_follow_each_other_also_over_chunks(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_reading.CHUNK", 2)
    lines = [
        {"custom_id": "a1", "prompt": "1", "session": {}},
        {"custom_id": "a2", "prompt": "2", "after": "a1"},
        {"custom_id": "b1", "prompt": "1", "session": {}},
        {"custom_id": "a3", "prompt": "3", "after": "a2"},
        {"custom_id": "b2", "prompt": "2", "after": "b1"},
        {"custom_id": "c", "prompt": "x"},
        {"custom_id": "c2", "prompt": "x", "after": "c"},
        {"custom_id": "d", "prompt": "x", "after": "nobody"},
    ]
    files.put("s3://data/in.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    batch_id = files.submit()
    files.run()
    by_name = {job.custom_id: job for job in files.items(batch_id)}
    assert [by_name[name].status for name in ("a1", "a2", "a3", "b1", "b2")] == [
        S.QUEUED,
        S.WAITING,
        S.WAITING,
        S.QUEUED,
        S.WAITING,
    ]
    assert [by_name[name].turn for name in ("a1", "a2", "a3")] == [1, 2, 3]
    assert "session" in str(by_name["c2"].error_message)
    assert "nobody" in str(by_name["d"].error_message)
    files.succeed_all(batch_id)
    history = files.world.database.read(_history, by_name["a1"].session_id)
    assert history == ["1", "2", "3"]


def _history(session: Session, session_id: str | None) -> list[str]:
    messages = reading.session_messages(session, str(session_id), after=(0, -1), limit=100)
    return [message.content[-1]["text"] for message in messages if message.role == "user"]


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


def test_a_wrong_line_stops_the_batch_too_if_it_is_to_stop(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(2) + b"?\n")
    batch_id = files.submit(on_item_error="stop", output_uri=None)
    files.run()
    assert files.batch(batch_id).status is BatchStatus.CANCELLING


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


def test_duplicates_wait_for_the_first_and_are_marked(files: Files) -> None:
    same = [{"custom_id": f"s{n}", "prompt": "the same"} for n in range(3)]
    sampled = [
        {"custom_id": f"r{n}", "prompt": "the same", "gen_config": {"do_sample": True}}
        for n in range(2)
    ]
    files.put(
        "s3://data/in.jsonl",
        b"".join(json.dumps(line).encode() + b"\n" for line in [*same, *sampled]),
    )
    batch_id = files.submit(dedupe=True)
    files.run()
    names = {job.id: job.custom_id for job in files.items(batch_id)}

    def let_in() -> set[str | None]:
        files.world.database.run(batch_windows.fill_windows, 100)
        due = files.world.database.run(dispatch.reserve_due, limit=100, republish_seconds=3600)
        return {names[each.job.id] for each in due}

    assert let_in() == {"s0", "r0", "r1"}
    by_name = {job.custom_id: job.id for job in files.items(batch_id)}
    files.world.succeed(by_name["s0"])
    assert let_in() == {"s1", "s2"}
    work = files.world.claimed(by_name["s1"])
    assert work.dedupe_key is not None
    found = files.world.database.read(
        reading.answered_before, batch_id, work.dedupe_key, by_name["s1"]
    )
    assert found is not None
    assert found.duplicate_of == "s0"
    assert found.usage.completion_tokens == 0


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
