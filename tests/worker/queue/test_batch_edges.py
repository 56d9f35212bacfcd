"""Batches whose input, timing or callers are unkind: each ends, once, and says why."""

from __future__ import annotations

import base64
import gzip
import json
import os

import pytest

from models import batch_holds, batches, jobs, submit
from tests.models.conftest import PERMANENT
from tests.worker.queue.conftest import Files, jsonl, let_holds_run_out
from visq import points
from visq.errors import ObjectForbidden, Unavailable
from visq.types import BatchRequest, BatchStatus
from visq.types import JobStatus as S
from worker.queue import BatchLoop
from worker.queue.batch_loop import UNEXPECTED_TRIES


def test_a_wrong_line_with_the_name_of_an_item_of_an_earlier_chunk_is_a_failed_item(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_reading.CHUNK", 2)
    wrong = b'{"custom_id": "item-0", "prompt": 7}\n'
    files.put("s3://data/in.jsonl", jsonl(2) + wrong + wrong)
    batch_id = files.submit()
    files.run()
    assert [(job.custom_id, job.status) for job in files.items(batch_id)] == [
        ("item-0", S.QUEUED),
        ("item-1", S.QUEUED),
        (None, S.FAILED),
        (None, S.FAILED),
    ]
    assert files.batch(batch_id).intake_done


def test_an_output_that_was_begun_before_a_retry_is_not_that_of_the_batch(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(1))
    batch_id = files.submit()
    files.run()
    [item] = files.items(batch_id)
    files.world.finish(files.world.claimed(item.id), PERMANENT)
    writer = files.world.database.run(batch_holds.take, seconds=30)
    assert writer is not None

    files.world.database.run(jobs.retry, item.id)
    files.world.succeed(item.id)
    assert files.batch(batch_id).status is BatchStatus.FINALIZING
    with pytest.raises(batch_holds.HoldLostError):
        files.world.database.run(batch_holds.close, writer, None, None)
    files.run()
    assert files.batch(batch_id).status is BatchStatus.COMPLETED
    assert [line["status"] for line in files.lines("s3://data/out.jsonl")] == ["succeeded"]


def test_a_small_file_that_is_much_of_nothing_is_refused_at_once(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visq.batch_files.lines._MOST_BLANK", 1000)
    monkeypatch.setattr("visq.batch_files.lines._LONGEST_LINE", 1 << 20)
    for nothing in (b"\n" * 1001, b"x" * (11 << 20)):
        files.put("s3://data/in.jsonl", gzip.compress(jsonl(1) + nothing, compresslevel=1))
        batch_id = files.submit(output_uri=None)
        files.run()
        batch = files.batch(batch_id)
        assert (batch.status, batch.total) == (BatchStatus.FAILED, 0)
        assert batch.errors is not None
        assert batch.errors[0]["code"] == "batch_input_invalid"


def test_what_was_read_slowly_is_kept_and_a_hold_is_renewed_while_nothing_is_found(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that takes long for each of the 250 items of a chunk, or for keys that are none."""
    monkeypatch.setattr("worker.queue.batch_reading.CHUNK_SECONDS", -1.0)
    files.put("s3://data/in.jsonl", jsonl(3))
    for name in ("a.txt", "b.txt", "c.jpg"):
        files.put(f"s3://data/photos/{name}", b"x")
    loop = files.loop()
    for fields, places in (
        ({}, [1, 2, 3]),
        ({"input_uri": "s3://data/photos/", "prompt": "describe"}, [0, 0, 1]),
    ):
        files.submit(output_uri=None, **fields)
        hold = files.world.database.run(batch_holds.take, seconds=30)
        assert hold is not None
        chunks = loop._reader.chunks(hold.batch, "acme", batch_holds.Place(), lambda: None)
        assert [chunk.place.position for chunk in chunks][: len(places)] == places
        loop._read(hold)


def test_a_hold_is_renewed_between_the_uploads_of_one_item(files: Files) -> None:
    pictures = [
        f"data:image/gif;base64,{base64.b64encode(b'GIF89a%d' % n).decode()}" for n in (1, 2)
    ]
    item = json.dumps({"custom_id": "a", "prompt": "x", "images": pictures})
    files.put("s3://data/in.jsonl", item.encode())
    files.submit(output_uri=None)
    hold = files.world.database.run(batch_holds.take, seconds=30)
    assert hold is not None
    uploads: list[int] = []

    def alive() -> None:
        uploads.append(len([*files.store.list("visq-uploads", "acme/")]) if uploads else 0)

    [*files.loop()._reader.chunks(hold.batch, "acme", batch_holds.Place(), alive)]
    assert uploads == [0, 1]


def test_a_reader_learns_of_a_cancellation_while_it_finds_nothing(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_loop.HOLD_SECONDS", -1.0)
    files.put("s3://data/in.jsonl", jsonl(1))
    batch_id = files.submit(output_uri=None)
    hold = files.world.database.run(batch_holds.take, seconds=30)
    assert hold is not None
    alive = files.loop()._still_ours(hold)
    alive()
    files.world.database.run(batches.request_cancel, batch_id)
    with pytest.raises(batch_holds.HoldLostError):
        alive()


@pytest.mark.parametrize("part", ["_read", "_write"])
def test_a_batch_at_which_visq_itself_fails_each_time_ends(
    files: Files, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.put("s3://data/in.jsonl", jsonl(1))
    batch_id = files.submit()
    if part == "_write":
        files.run()
        files.succeed_all(batch_id)

    def bug(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(BatchLoop, part, bug)
    loop = files.loop()
    for _ in range(UNEXPECTED_TRIES + 1):
        assert files.batch(batch_id).finished_at is None
        assert loop.round()
        files.world.database.run(let_holds_run_out)
    monkeypatch.undo()
    files.run()
    batch = files.batch(batch_id)
    assert batch.status is BatchStatus.FAILED
    assert batch.errors is not None
    assert batch.errors[0]["code"] == "internal_error"


def test_an_output_that_the_store_never_takes_is_given_up_after_a_day(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_loop.WRITE_TRIES", 2)

    def away(*_: object) -> None:
        raise Unavailable("the object store does not answer")

    monkeypatch.setattr("worker.queue.batch_writing.BatchWriter.write", away)
    files.put("s3://data/in.jsonl", jsonl(1))
    batch_id = files.submit()
    files.run()
    files.succeed_all(batch_id)
    loop = files.loop()
    for _ in range(3):
        assert files.batch(batch_id).status is BatchStatus.FINALIZING
        assert loop.round()
        files.world.database.run(let_holds_run_out)
    assert files.batch(batch_id).status is BatchStatus.FAILED


def test_a_batch_whose_input_broke_off_is_not_complete_because_an_item_was_retried(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_reading.CHUNK", 1)
    noise = b"".join(
        b'{"custom_id": "%d", "prompt": "%s"}\n' % (n, os.urandom(50_000).hex().encode())
        for n in range(4)
    )
    files.put("s3://data/in.jsonl", gzip.compress(noise)[:-60_000])
    batch_id = files.submit(output_uri=None)
    loop = files.loop()
    failed: list[str] = []

    def fail_one(reached: str) -> None:
        if reached == "batch.chunk_added" and not failed:
            [item] = files.items(batch_id)
            failed.append(item.id)
            files.world.finish(files.world.claimed(item.id), PERMANENT)

    points.listen(fail_one)
    try:
        loop.round()
    finally:
        points.listen(None)
    _cancel_all(files)
    assert files.batch(batch_id).status is BatchStatus.FAILED
    files.world.database.run(jobs.retry, failed[0])
    files.world.succeed(failed[0])
    batch = files.batch(batch_id)
    assert batch.status is BatchStatus.FAILED
    assert batch.errors is not None
    assert batch.errors[0]["code"] == "batch_input_invalid"


def test_an_output_that_failed_says_so_beside_what_was_wrong_before_and_a_retry_writes_it(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ObjectForbidden("the store refuses s3://data/out.jsonl")

    monkeypatch.setattr("worker.queue.batch_writing.BatchWriter.write", refuse)
    files.put("s3://data/in.jsonl", jsonl(1))
    batch_id = files.submit(on_item_error="stop")
    files.run()
    [item] = files.items(batch_id)
    files.world.finish(files.world.claimed(item.id), PERMANENT)
    files.run()
    errors = files.batch(batch_id).errors
    assert errors is not None
    assert [error["code"] for error in errors] == ["item_failed", "object_forbidden"]

    monkeypatch.undo()
    files.world.database.run(jobs.retry, item.id)
    files.world.succeed(item.id)
    files.run()
    assert files.batch(batch_id).status is BatchStatus.COMPLETED


def test_an_item_that_is_retried_has_not_ended(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(1))
    batch_id = files.submit(output_uri=None)
    files.run()
    [item] = files.items(batch_id)
    files.world.finish(files.world.claimed(item.id), PERMANENT)

    def ended() -> list[tuple[int, S]]:
        found = files.world.database.read(batches.ended_items, batch_id, after_number=0, limit=10)
        return [(number, job.status) for number, job in found]

    assert ended() == [(1, S.FAILED)]
    files.world.database.run(jobs.retry, item.id)
    assert ended() == [(1, S.QUEUED)], "no number is left out, and it shows that it runs again"
    files.world.succeed(item.id)
    assert ended() == [(1, S.SUCCEEDED), (2, S.SUCCEEDED)]


def test_the_time_at_which_a_batch_began_does_not_move_with_its_chunks(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_reading.CHUNK", 1)
    files.put("s3://data/in.jsonl", jsonl(3))
    batch_id = files.submit(output_uri=None)
    began = set()

    def look(reached: str) -> None:
        if reached == "batch.chunk_added":
            began.add(files.batch(batch_id).in_progress_at)

    points.listen(look)
    try:
        files.run()
    finally:
        points.listen(None)
    assert len(began) == 1


def test_an_answer_to_a_batch_counts_the_items_that_failed_at_once(files: Files) -> None:
    after = [{"custom_id": "a", "prompt": "x"}, {"custom_id": "b", "prompt": "y", "after": "a"}]
    request = BatchRequest.model_validate({"items": after, "on_item_error": "stop"})
    submitted = files.world.database.run(
        submit.submit_batch, files.world.tenant_id, request, max_attempts=3
    )
    assert (submitted.batch.failed, submitted.batch.status) == (1, BatchStatus.CANCELLING)


def test_a_tenant_of_many_batches_does_not_keep_another_ones_from_being_read(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(1))
    for _ in range(60):
        files.submit(output_uri=None)
    other = files.world.another_tenant("other")
    request = BatchRequest.model_validate({"input_uri": "s3://data/in.jsonl"})
    last = files.world.database.run(
        submit.submit_batch, other.tenant_id, request, max_attempts=3
    ).batch.id
    loop = files.loop()
    for _ in range(40):  # one time in two: never in 40 is one in 10^12
        loop.round()
    assert files.batch(last).intake_done


def test_an_output_whose_name_cannot_be_a_files_fails_and_is_not_tried_for_ever(
    files: Files,
) -> None:
    """In a folder a key cannot also be the folder of another key."""
    files.put("s3://data/in.jsonl", jsonl(1))
    files.put("s3://data/folder.jsonl/x", b"x")
    for uri in ("s3://data/in.jsonl/out.jsonl", "s3://data/folder.jsonl"):
        batch_id = files.submit(output_uri=uri)
        files.run()
        files.succeed_all(batch_id)
        files.run()
        batch = files.batch(batch_id)
        assert batch.status is BatchStatus.FAILED
        assert batch.errors is not None
        assert batch.errors[0]["code"] == "object_forbidden"


def _cancel_all(files: Files) -> None:
    while due := files.world.database.read(batches.to_cancel, 500):
        for job_id in due:
            files.world.database.run(jobs.cancel, job_id)
