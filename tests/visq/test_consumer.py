"""`visq.consume` on real brokers: nothing is lost, repeats are dropped, outages are waited out."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from amqp.exceptions import PreconditionFailed
from kombu import Connection, Queue

from tests.servers import RabbitMQ, Valkey
from tests.visq.consuming import SOON, consuming, depth
from tests.visq.result_events import ended_job, event_of, publisher
from tests.waiting import until
from visq import consume
from visq.consumer import Event
from visq.errors import ConfigurationError, Unavailable
from visq.types import JobKind, JobStatus


def test_a_handler_gets_the_event_as_types(broker_url: str) -> None:
    got: list[Event] = []
    job = ended_job("a green star")
    event = event_of(job)
    with consuming(broker_url, "all", got.append), publisher(broker_url) as broker:
        broker.publish_result(event)
        until(lambda: got, SOON, "the event")
    assert got[0].id == event["id"]
    assert got[0].type == "visq.job.succeeded"
    assert got[0].tenant == "acme"
    assert got[0].time == job.finished_at
    assert got[0].job == job


def test_topics_choose_what_the_queue_collects(broker_url: str) -> None:
    got: list[Event] = []
    last = ended_job("the last")
    with (
        consuming(broker_url, "failures", got.append, topics=["acme.*.failed", "acme.chat.*"]),
        publisher(broker_url) as broker,
    ):
        broker.publish_result(event_of(ended_job("no", kind=JobKind.GENERATE)))
        broker.publish_result(event_of(ended_job("no"), tenant="other"))
        failed = ended_job(kind=JobKind.GENERATE, status=JobStatus.FAILED)
        broker.publish_result(event_of(failed))
        broker.publish_result(event_of(last))
        until(lambda: len(got) == 2, SOON, "both events")
    assert [event.job.id for event in got] == [failed.id, last.id]


def test_a_jobs_own_queue_is_consumed_by_its_full_name(broker_url: str) -> None:
    got: list[Event] = []
    job = ended_job(result_queue="reports")
    with publisher(broker_url) as broker:
        broker.publish_result(event_of(job))  # before anybody consumes
    with consuming(broker_url, "visq.results.acme.reports", got.append, topics=()):
        until(lambda: got, SOON, "the event")
    assert got[0].job.id == job.id


def test_an_event_whose_handler_failed_comes_again_until_it_succeeds(broker_url: str) -> None:
    seen: list[str] = []

    def fails_twice(event: Event) -> None:
        seen.append(event.id)
        if seen.count(event.id) < 3:
            raise RuntimeError("not yet")

    with consuming(broker_url, "flaky", fails_twice), publisher(broker_url) as broker:
        event = event_of(ended_job())
        broker.publish_result(event)
        until(lambda: len(seen) == 3, SOON, "the third delivery")
    assert seen == [event["id"]] * 3
    assert depth(broker_url, "flaky") == 0, "it must be acknowledged in the end"


def test_one_failing_event_does_not_hold_up_the_others(broker_url: str) -> None:
    seen: list[str] = []
    bad, good = event_of(ended_job()), event_of(ended_job())

    def refuses_one(event: Event) -> None:
        if event.id == bad["id"]:
            raise RuntimeError("never")
        seen.append(event.id)

    with (
        consuming(broker_url, "poison", refuses_one, max_pause=3600),
        publisher(broker_url) as broker,
    ):
        broker.publish_result(bad)
        broker.publish_result(good)
        until(lambda: seen, SOON, "the good event")
    assert seen == [good["id"]]
    assert depth(broker_url, "poison") == 1, "the failed event must be given back at the end"


def test_repeats_are_dropped_by_id(broker_url: str) -> None:
    seen: list[str] = []
    event, last = event_of(ended_job()), event_of(ended_job())
    with (
        consuming(broker_url, "repeats", lambda event: seen.append(event.id)),
        publisher(broker_url) as broker,
    ):
        for published in (event, event, event, last):
            broker.publish_result(published)
        until(lambda: last["id"] in seen, SOON, "the last event")
    assert seen == [event["id"], last["id"]]


HANGS = """
import pathlib, sys, threading
from visq import consume

def handler(event):
    pathlib.Path(sys.argv[3]).write_text(event.id)
    threading.Event().wait()

consume(sys.argv[2], handler, broker_url=sys.argv[1], topics="acme.#", redeliver_after=2)
"""


@contextmanager
def hanging_consumer(broker_url: str, queue: str, mark: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that takes one event, says so in the file `mark`, and never ends with it."""
    process = subprocess.Popen([sys.executable, "-c", HANGS, broker_url, queue, str(mark)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_event_of_a_killed_consumer_goes_to_another(broker_url: str, tmp_path: Path) -> None:
    """Even though a sibling queue has acknowledged its own copy of the same message."""
    got: list[Event] = []
    sibling: list[str] = []
    event = event_of(ended_job())
    with consuming(broker_url, "killed", got.append):
        pass  # makes the queue
    with (
        consuming(broker_url, "sibling", lambda event: sibling.append(event.id), remember=1),
        publisher(broker_url) as broker,
    ):
        with hanging_consumer(broker_url, "killed", tmp_path / "taken") as process:
            broker.publish_result(event)
            until((tmp_path / "taken").exists, SOON, "the first consumer to take it")
            until(lambda: sibling, SOON, "the sibling's copy")
            process.kill()
        with consuming(broker_url, "killed", got.append):
            until(lambda: got, SOON, "the redelivery")
        last = event_of(ended_job())
        broker.publish_result(last)
        until(lambda: last["id"] in sibling, SOON, "the sibling's last event")
    assert got[0].id == event["id"]
    assert sibling == [event["id"], last["id"]], "a redelivery is of one queue only"


def test_a_slow_handler_keeps_its_event(redis_url: str) -> None:
    """On Redis a message is given to another after `redeliver_after`, unless it is renewed."""
    release = threading.Event()
    first: list[str] = []
    second: list[str] = []

    def slow(event: Event) -> None:
        first.append(event.id)
        release.wait(SOON)

    with consuming(redis_url, "slow", slow, redeliver_after=0.5), publisher(redis_url) as broker:
        broker.publish_result(event_of(ended_job()))
        until(lambda: first, SOON, "the slow handler to begin")
        with consuming(
            redis_url, "slow", lambda event: second.append(event.id), redeliver_after=0.5
        ):
            # Events that pass by the slow one, for several times `redeliver_after`.
            for number in range(1, 6):
                broker.publish_result(event_of(ended_job()))
                until(lambda: len(second) == number, SOON, "the next event")  # noqa: B023
                threading.Event().wait(0.4)
        release.set()
    assert len(first) == 1
    assert first[0] not in second


def test_renewals_take_nothing_from_the_queue(redis_url: str) -> None:
    """They once went over the connection that waits for messages, and swallowed some."""
    seen: list[str] = []
    bad = event_of(ended_job())

    def refuses_one(event: Event) -> None:
        if event.id == bad["id"]:
            raise RuntimeError("never")
        seen.append(event.id)

    with (
        consuming(redis_url, "renewed", refuses_one, redeliver_after=0.2, max_pause=3600),
        publisher(redis_url) as broker,
    ):
        broker.publish_result(bad)
        for _ in range(100):
            event = event_of(ended_job())
            broker.publish_result(event)
            until(lambda: event["id"] in seen, SOON, "the event")  # noqa: B023
    assert depth(redis_url, "renewed") == 1, "the failed event must be given back at the end"


@pytest.fixture(params=["redis", "rabbitmq"])
def own_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Valkey | RabbitMQ]:
    """A broker that a test may restart."""
    if request.param == "redis":
        with Valkey(tmp_path / "valkey") as valkey:
            yield valkey
    else:
        yield request.getfixturevalue("rabbitmq")


def test_a_consumer_goes_on_after_a_restart_of_the_broker(
    own_broker: Valkey | RabbitMQ,
) -> None:
    seen: list[str] = []
    url = own_broker.url
    before, after = event_of(ended_job()), event_of(ended_job())

    restarted = threading.Event()

    def handler(event: Event) -> None:
        seen.append(event.id)
        restarted.wait(60)

    with consuming(url, "restarted", handler) as connected:
        with publisher(url) as broker:
            broker.publish_result(before)
            until(lambda: seen, SOON, "the first event")
        own_broker.restart()
        restarted.set()  # the handler returns, and its acknowledgement is lost
        assert connected.acquire(timeout=60)
        with publisher(url) as broker:
            broker.publish_result(after)
            until(lambda: after["id"] in seen, SOON, "the event after the restart")
    assert depth(url, "restarted") == 0
    assert seen == [before["id"], after["id"]], "the redelivered event must be dropped as a repeat"


def test_no_known_broker_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISQ_BROKER_URL", raising=False)
    monkeypatch.setenv("VISQ_DATA", str(tmp_path))
    with pytest.raises(ConfigurationError, match="VISQ_BROKER_URL"):
        consume("queue", print)


def test_a_queue_that_exists_in_another_form_is_used_as_it_is(rabbitmq: RabbitMQ) -> None:
    url = rabbitmq.create_virtual_host()
    got: list[Event] = []
    with Connection(url) as connection:
        Queue("other", durable=True, max_length=30)(connection.default_channel).declare()
    with consuming(url, "other", got.append), publisher(url) as broker:
        broker.publish_result(event_of(ended_job()))
        until(lambda: got, SOON, "the event")


def test_the_queues_of_results_are_quorum_queues(rabbitmq: RabbitMQ) -> None:
    """Declaring one again as a classic queue, which is the default, is refused."""
    url = rabbitmq.create_virtual_host()

    def refuses(_: Event) -> None:
        raise RuntimeError("never")

    with consuming(url, "mine", refuses, max_deliveries=1), publisher(url) as broker:
        broker.publish_result(event_of(ended_job(result_queue="reports")))
        until(lambda: depth(url, "mine.dead"), SOON, "the dead letter")
    for name in ("mine", "mine.suspects", "mine.dead", "visq.results.acme.reports"):
        with Connection(url) as connection, pytest.raises(PreconditionFailed, match="quorum"):
            Queue(name, durable=True)(connection.default_channel).declare()


def test_a_result_queue_that_was_deleted_is_made_again(rabbitmq: RabbitMQ) -> None:
    """What is published to a queue that is gone would be dropped, and confirmed."""
    broker_url = rabbitmq.create_virtual_host()
    job = ended_job(result_queue="reports")
    with publisher(broker_url) as broker:
        broker.publish_result(event_of(job))
        with Connection(broker_url) as connection:
            Queue("visq.results.acme.reports")(connection.default_channel).delete()
        broker.publish_result(event_of(job))
    assert depth(broker_url, "visq.results.acme.reports") == 1


def test_a_result_that_its_queue_refuses_is_an_error(rabbitmq: RabbitMQ) -> None:
    url = rabbitmq.create_virtual_host()
    with Connection(url) as connection:
        Queue(
            "visq.results.acme.full",
            durable=True,
            queue_arguments={"x-max-length": 1, "x-overflow": "reject-publish"},
        )(connection.default_channel).declare()
    with publisher(url) as broker:
        broker.publish_result(event_of(ended_job(result_queue="full")))
        with pytest.raises(Unavailable):
            broker.publish_result(event_of(ended_job(result_queue="full")))
        broker.publish_result(event_of(ended_job(result_queue="another")))
