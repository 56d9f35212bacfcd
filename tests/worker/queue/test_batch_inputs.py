"""What lines of a file, and images under a prefix, become: items that run, wait, or have failed."""

from __future__ import annotations

import gzip
import json

import pytest
from sqlalchemy.orm import Session

from models import batch_windows, dispatch, jobs, reading
from models.views import batch_view
from tests.worker.queue.conftest import Files, jsonl
from visq.types import BatchStatus
from visq.types import JobStatus as S


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


def test_a_wrong_line_stops_the_batch_too_if_it_is_to_stop(files: Files) -> None:
    files.put("s3://data/in.jsonl", jsonl(2) + b"?\n")
    batch_id = files.submit(on_item_error="stop", output_uri=None)
    files.run()
    assert files.batch(batch_id).status is BatchStatus.CANCELLING


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
