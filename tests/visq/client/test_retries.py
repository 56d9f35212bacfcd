"""Faults between client and server: lost answers, closed connections, errors for a moment."""

from __future__ import annotations

import json
import threading

import pytest

from tests.api.running import PlayedWorker
from tests.visq.client.faulty import Close, Cut, FaultyServer, LoseAnswer, Reply
from visq import Client, errors
from visq.client.flows import RetryPolicy, retry_after

JOB_ID = "job_" + "0" * 32


@pytest.fixture
def client(faulty: FaultyServer, secret: str) -> Client:
    """A client that reaches the real API through the faulty server."""
    return Client(faulty.url, secret)


def test_a_lost_answer_makes_one_job(client: Client, faulty: FaultyServer) -> None:
    faulty.faults = [LoseAnswer(), Close()]
    job = client.jobs.submit("How many?")
    assert [found.id for found in client.jobs.list()] == [job.id]
    keys = {seen.headers["idempotency-key"] for seen in faulty.seen if seen.method == "POST"}
    assert len(keys) == 1
    assert client.jobs.submit("How many?").id != job.id, "another call is another job"


def test_a_lost_answer_makes_one_batch(client: Client, faulty: FaultyServer) -> None:
    faulty.faults = [LoseAnswer()]
    batch = client.batches.submit([{"prompt": "One"}])
    assert [found.id for found in client.batches.list()] == [batch.id]


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_errors_for_a_moment_are_retried(client: Client, faulty: FaultyServer, status: int) -> None:
    faulty.faults = [Reply(status, {"Content-Type": "text/html"}, b"<h1>Busy</h1>")]
    assert client.models.list() is not None
    assert len(faulty.seen) == 2


def test_a_server_that_stays_away_is_unavailable(faulty: FaultyServer) -> None:
    faulty.faults = [Close(), Reply(503)]
    with Client(faulty.url, "key", max_retries=1) as client, pytest.raises(errors.Unavailable):
        client.models.list()
    assert len(faulty.seen) == 2


def test_nothing_is_retried_that_would_fail_again(client: Client, faulty: FaultyServer) -> None:
    with pytest.raises(errors.NotFound):
        client.jobs.get(JOB_ID)
    assert len(faulty.seen) == 1


def test_a_retry_of_a_job_is_not_sent_twice(client: Client, faulty: FaultyServer) -> None:
    """The second would meet a job that is not failed any more."""
    faulty.faults = [LoseAnswer()]
    with pytest.raises(errors.Unavailable):
        client.jobs.retry(JOB_ID)
    assert len(faulty.seen) == 1


def test_a_server_that_asks_for_a_long_pause_is_not_waited_for(
    client: Client, faulty: FaultyServer
) -> None:
    faulty.faults = [Reply(429, {"Retry-After": "3600"})]
    with pytest.raises(errors.Unavailable):
        client.models.list()
    assert len(faulty.seen) == 1


def test_retry_after_is_read_as_seconds_and_as_a_date() -> None:
    assert retry_after({"retry-after": "7"}) == 7.0
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_pauses_double_up_to_a_limit_and_differ() -> None:
    policy = RetryPolicy(max_retries=9, first_seconds=1, most_seconds=4)
    for failures, most in ((1, 1), (2, 2), (3, 4), (4, 4)):
        pauses = {policy.delay(failures) for _ in range(20)}
        assert len(pauses) > 1
        assert all(most / 2 <= pause <= most for pause in pauses)


def test_a_code_of_a_later_version_is_still_an_error_of_ours(faulty: FaultyServer) -> None:
    body = {"error": {"code": "quota_exceeded", "message": "Too many.", "param": None}}
    faulty.faults = [Reply(403, {}, json.dumps(body).encode())]
    with (
        Client(faulty.url, "key") as client,
        pytest.raises(errors.VisqError, match=r"Too many\. \(quota_exceeded\)"),
    ):
        client.jobs.get(JOB_ID)


def test_a_broken_stream_goes_on_where_it_broke(
    client: Client, faulty: FaultyServer, worker: PlayedWorker
) -> None:
    job = client.jobs.submit("How many?")
    claim = worker.begin(job.id)
    faulty.faults = [Cut(after=b"Two"), Reply(503), Close()]
    pieces = job.stream()
    worker.say(claim, "Two")
    assert next(pieces) == "Two"
    worker.say(claim, " cats")
    threading.Timer(0.1, worker.succeed, (claim, "Two cats")).start()
    assert "".join(pieces) == " cats"
    assert job.status == "succeeded"
    opened = [seen.headers.get("last-event-id") for seen in faulty.seen if "events" in seen.path]
    assert opened[0] is None
    assert None not in opened[1:]


def test_a_stream_over_two_attempts_says_nothing_twice(
    client: Client, worker: PlayedWorker
) -> None:
    job = client.jobs.submit("How many?")
    first = worker.begin(job.id)
    pieces = job.stream()
    worker.say(first, "Two ca")
    assert next(pieces) == "Two ca"
    worker.courier.events.attempt(job.id, 2)
    for text in ("Two", " cats", "."):
        worker.courier.events.token(job.id, 2, text)
    worker.succeed(first, "Two cats.")
    assert "".join(pieces) == "ts."


def test_a_second_attempt_that_says_something_else_is_shown_whole(
    client: Client, worker: PlayedWorker
) -> None:
    job = client.jobs.submit("How many?")
    first = worker.begin(job.id)
    pieces = job.stream()
    worker.say(first, "Two")
    assert next(pieces) == "Two"
    worker.courier.events.attempt(job.id, 2)
    worker.courier.events.token(job.id, 2, "Three.")
    worker.succeed(first, "Three.")
    assert "".join(pieces) == "\nThree."


def test_the_stream_of_an_ended_job_replays(client: Client, worker: PlayedWorker) -> None:
    job = client.jobs.submit("How many?")
    worker.answer(job.id, "Three.")
    assert "".join(job.stream()) == "Three."


def test_the_stream_of_a_job_without_an_answer_raises(client: Client, worker: PlayedWorker) -> None:
    job = client.jobs.submit("How many?")
    worker.fail(worker.begin(job.id))
    with pytest.raises(errors.EngineError):
        list(job.stream())


def test_a_wait_outlives_an_outage(faulty: FaultyServer, secret: str, worker: PlayedWorker) -> None:
    with Client(faulty.url, secret, max_retries=1) as client:
        job = client.jobs.submit("How many?")
        faulty.faults = [Close(), Close(), Close()]  # more than `max_retries`
        worker.answer(job.id)
        assert job.wait(timeout=50).status == "succeeded"
    assert not faulty.faults
