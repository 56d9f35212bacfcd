"""Batches whose input, timing or callers are unkind: each ends, once, and says why."""

from __future__ import annotations

import gzip

import pytest

from models import batch_holds, batches, jobs
from tests.models.conftest import PERMANENT
from tests.worker.queue.conftest import Files, jsonl, let_holds_run_out
from visq.errors import Unavailable
from visq.types import BatchStatus
from visq.types import JobStatus as S
from worker.queue import BatchLoop
from worker.queue.batch_loop import UNEXPECTED_TRIES


def test_a_wrong_line_with_the_name_of_an_item_of_an_earlier_chunk_is_a_failed_item(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_reading.CHUNK", 2)
    wrong = b'{"custom_id": "item-0", "prompt": 7}\n'
    files.put("s3://work/in.jsonl", jsonl(2) + wrong + wrong)
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
    files.put("s3://work/in.jsonl", jsonl(1))
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
    assert [line["status"] for line in files.lines("s3://work/out.jsonl")] == ["succeeded"]


def test_a_small_file_that_is_much_of_nothing_is_refused_at_once(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visq.batch_files.lines._MOST_BLANK", 1000)
    monkeypatch.setattr("visq.batch_files.lines._LONGEST_LINE", 1 << 20)
    for nothing in (b"\n" * 1001, b"x" * (11 << 20)):
        files.put("s3://work/in.jsonl", gzip.compress(jsonl(1) + nothing, compresslevel=1))
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
    files.put("s3://work/in.jsonl", jsonl(3))
    for name in ("a.txt", "b.txt", "c.jpg"):
        files.put(f"s3://work/photos/{name}", b"x")
    loop = files.loop()
    for fields, places in (
        ({}, [1, 2, 3]),
        ({"input_uri": "s3://work/photos/", "prompt": "describe"}, [0, 0, 1]),
    ):
        files.submit(output_uri=None, **fields)
        hold = files.world.database.run(batch_holds.take, seconds=30)
        assert hold is not None
        chunks = loop._reader.chunks(hold.batch, "acme", batch_holds.Place(), lambda: None)
        assert [chunk.place.position for chunk in chunks][: len(places)] == places
        loop._read(hold)


def test_a_reader_learns_of_a_cancellation_while_it_finds_nothing(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.batch_loop.HOLD_SECONDS", -1.0)
    files.put("s3://work/in.jsonl", jsonl(1))
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
    files.put("s3://work/in.jsonl", jsonl(1))
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
    files.put("s3://work/in.jsonl", jsonl(1))
    batch_id = files.submit()
    files.run()
    files.succeed_all(batch_id)
    loop = files.loop()
    for _ in range(3):
        assert files.batch(batch_id).status is BatchStatus.FINALIZING
        assert loop.round()
        files.world.database.run(let_holds_run_out)
    assert files.batch(batch_id).status is BatchStatus.FAILED
