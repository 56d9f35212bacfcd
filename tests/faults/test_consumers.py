"""Delivery to consumers under real faults: killed, poisoned and slow consumers, broken brokers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from sqlalchemy import select

from migrations import run as migrations
from models.database import Database
from models.outbox import OutboxEntry
from models.outcomes import QueuedJob
from models.tables import Outbox
from tests.servers import RabbitMQ, Valkey
from tests.visq.consuming import SOON, consuming, depth, take_all
from tests.visq.result_events import ended_job, event_of, publisher
from tests.waiting import until
from visq.consumer import Event
from visq.errors import Unavailable
from visq.settings import Settings
from visq.types import Lane
from worker.queue import Courier

DIES_OF_ONE = """
import os, pathlib, signal, sys
from visq import consume

broker, queue, poison, handled = sys.argv[1:]

def handler(event):
    if event.id == poison:
        os.kill(os.getpid(), signal.SIGKILL)
    (pathlib.Path(handled) / event.id).touch()

consume(queue, handler, broker_url=broker, redeliver_after=0.5, max_deliveries=3)
"""


def test_an_event_that_kills_its_consumer_ends_as_a_dead_letter_and_none_beside_it_does(
    broker_url: str, tmp_path: Path
) -> None:
    """Those beside it were fetched together with it, and come again each time, too."""
    poison = event_of(ended_job())
    others = [event_of(ended_job()) for _ in range(10)]
    with consuming(broker_url, "work", print):
        pass  # makes the queue
    with publisher(broker_url) as broker:
        for event in (poison, *others):
            broker.publish_result(event)

    def finished() -> bool:
        return depth(broker_url, "work.dead") > 0 and len(list(tmp_path.iterdir())) == len(others)

    deaths = 0
    command = [sys.executable, "-c", DIES_OF_ONE, broker_url, "work", poison["id"], str(tmp_path)]
    while not finished():
        with running(command) as process:
            until(lambda: finished() or process.poll() is not None, SOON, "its end")
            deaths += process.poll() == -signal.SIGKILL
    assert deaths == 3
    assert {path.name for path in tmp_path.iterdir()} == {event["id"] for event in others}
    [letter] = take_all(broker_url, "work.dead")
    assert letter.properties["message_id"] == poison["id"]
    assert letter.headers["x-visq-deliveries"] == 3
    assert letter.headers["x-visq-error"] == "ConsumerEnded"
    assert depth(broker_url, "work") == depth(broker_url, "work.suspects") == 0


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_slow_consumer_holds_few_events_and_slows_no_worker_down(broker_url: str) -> None:
    release, begun = threading.Event(), threading.Event()
    prefetch, count = 8, 150

    def hangs(_: Event) -> None:
        begun.set()
        release.wait(SOON)

    def seconds_to_publish() -> float:
        started = time.monotonic()
        for _ in range(count):
            broker.publish_result(event_of(ended_job("x" * 10_000)))
        return time.monotonic() - started

    with consuming(broker_url, "slow", hangs):
        pass  # makes the queue
    with publisher(broker_url) as broker:
        nobody_consumes = seconds_to_publish()
        with consuming(broker_url, "slow", hangs, prefetch=prefetch):
            until(begun.is_set, SOON, "the handler to begin")
            one_is_slow = seconds_to_publish()
            held = 2 * count - depth(broker_url, "slow")
            release.set()
    assert 1 <= held <= prefetch
    assert one_is_slow < 3 * nobody_consumes + 0.5


class Published:
    """Results and jobs, published by two threads in the way of a worker, from an outbox."""

    def __init__(self, courier: Courier, database: Database) -> None:
        self._courier = courier
        self._database = database
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(publish,))
            for publish in (self._result, self._job)
        ]
        self.results: list[str] = []
        """Ids of the events that were in the outbox."""
        self.confirmed_jobs: list[str] = []
        self.failures = 0

    def __enter__(self) -> Published:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def in_outbox(self) -> list[OutboxEntry]:
        rows = self._database.read(
            lambda session: session.execute(select(Outbox.id, Outbox.kind, Outbox.payload)).all()
        )
        return [OutboxEntry(*row) for row in rows]

    def _repeat(self, publish: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                publish()
            except Unavailable:
                self.failures += 1
                self._stop.wait(0.05)

    def _result(self) -> None:
        event = event_of(ended_job(result_queue="mine"))
        self._database.run(
            lambda session: session.add(Outbox(id=event["id"], kind="result", payload=event))
        )
        self.results.append(event["id"])
        self._courier.publish_events([OutboxEntry(event["id"], "result", event)])

    def _job(self) -> None:
        job_id = f"job_{len(self.confirmed_jobs)}"
        self._courier.broker.publish_jobs([QueuedJob(job_id, Lane.STANDARD)])
        self.confirmed_jobs.append(job_id)


def test_rabbitmq_killed_while_results_and_jobs_are_published_loses_no_confirmed_one(
    rabbitmq: RabbitMQ, redis_url: str, sqlite_url: str, tmp_path: Path
) -> None:
    url = rabbitmq.create_virtual_host()
    migrations.upgrade(sqlite_url)
    database = Database(sqlite_url)
    courier = Courier(Settings(data=tmp_path, broker_url=url, redis_url=redis_url), database)
    with consuming(url, "all", print):
        pass  # makes the queue
    with Published(courier, database) as published:
        until(lambda: len(published.results) > 30, SOON, "some results")
        until(lambda: len(published.confirmed_jobs) > 30, SOON, "some jobs")
        # A quorum queue that is not half a second old would not work after this kill.
        threading.Event().wait(1.0)
        rabbitmq.kill()
        until(lambda: published.failures > 5, SOON, "the outage")
        rabbitmq.start()
        results, jobs = len(published.results), len(published.confirmed_jobs)
        until(lambda: len(published.results) > results + 10, SOON, "results after the restart")
        until(lambda: len(published.confirmed_jobs) > jobs + 10, SOON, "jobs after the restart")

    late = published.in_outbox()
    assert late, "the kill must have hit a result"
    courier.publish_events(late)
    assert published.in_outbox() == []
    for queue in ("all", "visq.results.acme.mine"):
        came = {message.properties["message_id"] for message in take_all(url, queue)}
        assert came == set(published.results)
    came = {json.loads(message.body)[0][0][0] for message in take_all(url, "visq.standard")}
    assert came >= set(published.confirmed_jobs)
    courier.close()
    database.close()


def test_a_rabbitmq_that_hangs_is_an_outage_and_its_late_confirmation_is_for_nothing_else(
    rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.queue.broker.CONFIRM_SECONDS", 1.0)
    url = rabbitmq.create_virtual_host()
    with consuming(url, "all", print):
        pass  # makes the queue
    first, hung, last = (event_of(ended_job()) for _ in range(3))
    with publisher(url) as broker:
        broker.publish_result(first)
        broker.publish_jobs([QueuedJob("job_first", Lane.STANDARD)])
        assert rabbitmq.process is not None
        os.kill(rabbitmq.process.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(Unavailable):
                broker.publish_result(hung)
            with pytest.raises(Unavailable):
                broker.publish_jobs([QueuedJob("job_hung", Lane.STANDARD)])
            assert time.monotonic() - started < 5
        finally:
            os.kill(rabbitmq.process.pid, signal.SIGCONT)
        broker.publish_result(last)
        came = [message.properties["message_id"] for message in take_all(url, "all")]
    assert came[0] == first["id"]
    assert last["id"] in came


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server that this test may kill."""
    with Valkey(tmp_path / "valkey") as server:
        yield server


def test_redis_killed_while_a_consumer_holds_events_loses_none(own_valkey: Valkey) -> None:
    """It keeps an append-only file. Held are one in the handler and those that failed."""
    url = own_valkey.url
    events = [event_of(ended_job()) for _ in range(20)]
    failed: list[str] = []
    handled: set[str] = set()
    hanging, healed = threading.Event(), threading.Event()

    def handler(event: Event) -> None:
        if not healed.is_set():
            if len(failed) == 5:
                hanging.set()
                healed.wait(SOON)
            failed.append(event.id)
            raise RuntimeError("not yet")
        handled.add(event.id)

    with consuming(url, "work", handler, max_pause=3600, redeliver_after=1.0, prefetch=8) as ready:
        with publisher(url) as broker:
            for event in events:
                broker.publish_result(event)
        until(hanging.is_set, SOON, "five failures and a hanging handler")
        assert depth(url, "work") == len(events) - 6
        own_valkey.kill()
        own_valkey.start()
        healed.set()
        assert ready.acquire(timeout=SOON)
        until(lambda: len(handled) == len(events), SOON, "all events")
    assert handled == {event["id"] for event in events}


def test_a_consumer_goes_on_after_redis_was_flushed(redis_url: str) -> None:
    """What waited is lost; what comes a second later is not, though the bindings were lost, too."""
    seen: list[str] = []
    with (
        consuming(redis_url, "work", lambda event: seen.append(event.id)),
        publisher(redis_url) as broker,
    ):
        before = event_of(ended_job())
        broker.publish_result(before)
        until(lambda: seen, SOON, "the event before")
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
            until(lambda: client.exists("_kombu.binding.visq.results"), SOON, "the bindings")
        after = event_of(ended_job())
        broker.publish_result(after)
        until(lambda: after["id"] in seen, SOON, "the event after")
    assert seen == [before["id"], after["id"]]
