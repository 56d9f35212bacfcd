"""`visq.Client` against the real API: every call, with a worker that the test plays."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from PIL import Image

from tests.api.running import PlayedWorker
from visq import Client, errors
from visq.types import JobStatus, Message, TextPart

PIXELS = io.BytesIO()
Image.new("RGB", (2, 2), "red").save(PIXELS, "PNG")


def test_a_submitted_job_is_waited_for_and_answered(client: Client, answering: None) -> None:
    job = client.jobs.submit("How many?", metadata={"order": "7"})
    assert job.view.metadata == {"order": "7"}
    assert job.wait().status is JobStatus.SUCCEEDED
    assert job.result().text == "You asked: How many?"


def test_messages_are_sent_as_given(client: Client, answering: None) -> None:
    job = client.jobs.submit(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        ],
        kind="generate",
    )
    assert job.result().text == "You asked: Why?"


def test_messages_may_be_objects_made_with_their_defaults(client: Client, answering: None) -> None:
    message = Message(role="user", content=[TextPart(text="Why?")])
    assert client.jobs.submit(messages=[message]).result().text == "You asked: Why?"


def test_a_wait_ends_at_its_timeout_and_the_job_goes_on(client: Client) -> None:
    job = client.jobs.submit("How many?")
    with pytest.raises(TimeoutError, match=job.id):
        job.wait(timeout=0.1)
    assert job.refresh().status is JobStatus.QUEUED


def test_a_job_without_an_answer_raises_its_error(client: Client, worker: PlayedWorker) -> None:
    failed = client.jobs.submit("How many?")
    worker.fail(worker.claim(failed.id))
    assert failed.wait().status is JobStatus.FAILED
    with pytest.raises(errors.EngineError, match="it cannot"):
        failed.result()
    cancelled = client.jobs.submit("How many?")
    cancelled.cancel()
    with pytest.raises(errors.JobCancelled, match=cancelled.id):
        cancelled.result()


def test_a_failed_job_is_retried_and_its_history_is_told(
    client: Client, worker: PlayedWorker
) -> None:
    job = client.jobs.submit("How many?")
    worker.fail(worker.claim(job.id))
    assert job.retry().status is JobStatus.QUEUED
    worker.answer(job.id, "Three.")
    assert job.result().text == "Three."
    assert [event.to_status for event in job.history()] == [
        JobStatus.QUEUED,
        JobStatus.RUNNING,
        JobStatus.FAILED,
        JobStatus.QUEUED,
        JobStatus.RUNNING,
        JobStatus.SUCCEEDED,
    ]
    with pytest.raises(errors.NotRetriable):
        client.jobs.retry(job.id)


def test_lists_go_over_all_pages(client: Client) -> None:
    submitted = [client.jobs.submit(f"Number {number}").id for number in range(103)]
    assert [job.id for job in client.jobs.list()] == submitted[::-1]
    client.jobs.cancel(submitted[0])
    assert [job.id for job in client.jobs.list(status="cancelled")] == [submitted[0]]


def test_errors_of_the_api_are_typed(client: Client) -> None:
    with pytest.raises(errors.NotFound):
        client.jobs.get("job_" + "0" * 32)
    with pytest.raises(errors.InvalidRequest) as raised:
        client.jobs.submit("Why?", gen_config={"temperature": 7})
    assert raised.value.param == "gen_config.temperature"
    with Client(client.base_url, "not-a-key") as stranger, pytest.raises(errors.Unauthorized):
        stranger.jobs.get("job_" + "0" * 32)


def test_the_same_key_with_another_body_is_a_conflict(client: Client) -> None:
    first = client.jobs.submit("One", idempotency_key="k")
    assert client.jobs.submit("One", idempotency_key="k").id == first.id
    with pytest.raises(errors.IdempotencyConflict):
        client.jobs.submit("Two", idempotency_key="k")


def test_a_session_continues(client: Client, answering: None) -> None:
    session = client.sessions.create(metadata={"user": "ann"})
    assert session.chat("First").result().text == "You asked: First"
    second = session.chat("Second")
    assert second.session_id == session.id
    second.wait()
    assert session.refresh().turns == 2
    said = [message.content[0] for message in session.messages()]
    assert [part.text for part in said if isinstance(part, TextPart)] == [
        "First",
        "You asked: First",
        "Second",
        "You asked: Second",
    ]
    fork = session.fork(at_turn=1)
    assert fork.view.forked_from == session.id
    assert len(list(fork.messages())) == 2
    assert [found.id for found in client.sessions.list()] == [fork.id, session.id]
    session.delete()
    with pytest.raises(errors.NotFound):
        client.sessions.get(session.id)


def test_a_job_can_open_a_session(client: Client, answering: None) -> None:
    job = client.jobs.submit("First", session={})
    assert job.session_id is not None
    job.wait()
    assert client.sessions.get(job.session_id).view.turns == 1


def test_local_images_are_uploaded_wherever_an_image_is_expected(
    client: Client, answering: None, tmp_path: Path
) -> None:
    path = tmp_path / "img_1.png"  # not an id, though it begins like one
    path.write_bytes(PIXELS.getvalue())
    with path.open("rb") as opened:
        images = [str(path), path, PIXELS.getvalue(), opened, Image.open(path)]
        job = client.jobs.submit("What is it?", images=images)
    assert job.result().usage.images == 5
    uploaded = client.images.upload(path)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": str(path)}},
                {"type": "image_url", "image_url": uploaded.uri},
                {"type": "image_url", "image_url": Image.open(path)},
                {"type": "text", "text": "What are they?"},
            ],
        }
    ]
    assert client.jobs.submit(messages=messages).result().usage.images == 3
    assert client.jobs.submit("And this?", images=uploaded.id).result().usage.images == 1


def test_an_image_that_is_not_there_is_named(client: Client) -> None:
    with pytest.raises(errors.ImageNotFound, match=r"nowhere\.jpg"):
        client.jobs.submit("What is it?", images=["nowhere.jpg"])
    with pytest.raises(errors.InvalidRequest, match="not int"):
        client.jobs.submit("What is it?", images=[7])  # type: ignore[list-item]


def test_a_batch_reports_progress_and_gives_its_results_in_input_order(
    client: Client, worker: PlayedWorker
) -> None:
    items = [
        {"custom_id": "b", "prompt": "First"},
        ("Second", PIXELS.getvalue()),
        {"prompt": "Third"},
    ]
    batch = client.batches.submit(items, metadata={"night": "1"})
    ids = {job.custom_id: job.id for job in client.jobs.list(batch_id=batch.id)}
    assert set(ids) == {"b", "1", "2"}
    results = client.batches.get(batch.id).results()
    worker.answer(ids["1"], "second")
    worker.answer(ids["b"], "first")
    assert [next(results).custom_id, next(results).custom_id] == ["b", "1"]
    # The last one is waited for.
    threading.Timer(0.1, worker.answer, (ids["2"], "third")).start()
    assert [job.custom_id for job in results] == ["2"]

    counts = []
    batch.wait(on_progress=counts.append)
    assert counts[-1].succeeded == batch.counts.finished == 3
    again = client.batches.get(batch.id)
    assert [job.result.text for job in again.results() if job.result] == [
        "first",
        "second",
        "third",
    ]
    assert [found.id for found in client.batches.list()] == [batch.id]


def test_results_of_a_large_batch_come_over_pages(client: Client, answering: None) -> None:
    batch = client.batches.submit([{"prompt": f"Item {number}"} for number in range(230)])
    assert [job.custom_id for job in batch.results()] == [str(number) for number in range(230)]


def test_a_cancelled_batch_ends(client: Client, answering: None) -> None:
    batch = client.batches.submit([{"prompt": "One"}, {"prompt": "Two"}])
    batch.cancel()
    ended = batch.wait(timeout=30)
    assert ended.counts.finished == 2
    assert len(list(batch.results())) == 2


def test_models_are_those_of_live_workers(client: Client, worker: PlayedWorker) -> None:
    worker.announce(model="small")
    assert "small" in [model.id for model in client.models.list()]


def test_ready_asks_the_server(client: Client) -> None:
    assert client.ready()
    assert not Client("http://127.0.0.1:9", "key").ready()


def test_no_known_server_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISQ_URL", raising=False)
    monkeypatch.setenv("VISQ_DATA", str(tmp_path))
    with pytest.raises(errors.ConfigurationError, match="VISQ_URL"):
        Client()


def test_the_environment_says_which_server(
    client: Client, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISQ_URL", client.base_url + "/")
    monkeypatch.setenv("VISQ_API_KEY", secret)
    with Client() as found:
        assert list(found.jobs.list()) == []
