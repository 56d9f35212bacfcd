"""Events that a handler refuses: pauses that grow, a dead-letter queue, and the way back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from kombu import Connection

from tests.visq.consuming import SOON, consuming, depth, take_all
from tests.visq.result_events import ended_job, event_of, publisher
from tests.waiting import until
from visq import bring_back
from visq.consumer import Event


def refusing(event_id: str, seen: list[Event]) -> Callable[[Event], None]:
    """A handler that fails on one event and notes all."""

    def handler(event: Event) -> None:
        seen.append(event)
        if event.id == event_id:
            raise ValueError(f"no disk for {event.job.id}")

    return handler


def test_a_refused_event_comes_at_growing_intervals_and_ends_as_a_dead_letter(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visq.consumer.FIRST_PAUSE", 0.2)
    bad = event_of(ended_job())
    others = [event_of(ended_job()) for _ in range(20)]
    seen: list[Event] = []
    times: list[float] = []
    refuse = refusing(bad["id"], seen)

    def handler(event: Event) -> None:
        if event.id == bad["id"]:
            times.append(time.monotonic())
        refuse(event)

    with (
        consuming(broker_url, "work", handler, max_deliveries=4, max_pause=60, prefetch=4),
        publisher(broker_url) as broker,
    ):
        broker.publish_result(bad)
        until(lambda: times, SOON, "the first failure")
        for event in others:
            broker.publish_result(event)
        until(lambda: len(seen) >= 1 + len(others), SOON, "the events behind it")
        assert len(times) < 4, "it must not hold the others up"
        until(lambda: len(times) == 4, SOON, "the last delivery")
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(gaps) == 3
    for gap, pause in zip(gaps, (0.2, 0.4, 0.8), strict=True):
        assert gap >= pause
    assert depth(broker_url, "work") == 0
    [letter] = take_all(broker_url, "work.dead")
    assert letter.properties["message_id"] == bad["id"]
    assert json.loads(letter.body) == bad
    assert letter.headers["x-visq-deliveries"] == 4
    assert letter.headers["x-visq-first-failed-at"] < letter.headers["x-visq-last-failed-at"]
    assert letter.headers["x-visq-error"] == "ValueError"
    assert letter.headers["x-visq-error-message"] == f"no disk for {bad['data']['id']}"


def test_dead_letters_are_looked_at_and_brought_back(broker_url: str) -> None:
    bad, seen = event_of(ended_job()), list[Event]()
    with (
        consuming(broker_url, "work", refusing(bad["id"], seen), max_deliveries=2),
        publisher(broker_url) as broker,
    ):
        broker.publish_result(bad)
        until(lambda: len(seen) == 2, SOON, "both deliveries")

    def look(event: Event) -> None:
        looked.append(event)
        raise RuntimeError("only looking")

    looked: list[Event] = []
    for times in (1, 2):
        with consuming(
            broker_url, "work.dead", look, topics=(), max_deliveries=None, max_pause=3600
        ):
            until(lambda: len(looked) == times, SOON, "the dead letter")  # noqa: B023
        failure = looked[-1].failure
        assert failure is not None
        assert (failure.deliveries, failure.error) == (2, "ValueError")

    assert bring_back("work", broker_url=broker_url) == 1
    assert bring_back("work", broker_url=broker_url) == 0
    handled: list[Event] = []
    with consuming(broker_url, "work", handled.append, max_deliveries=2):
        until(lambda: handled, SOON, "the event that was brought back")
    assert handled[0].id == bad["id"]
    assert handled[0].failure is None
    assert depth(broker_url, "work") == 0


def test_only_so_many_dead_letters_are_brought_back(broker_url: str) -> None:
    events = [event_of(ended_job()) for _ in range(3)]

    def refuses(event: Event) -> None:
        seen.append(event.id)
        raise RuntimeError("never")

    seen: list[str] = []
    with (
        consuming(broker_url, "work", refuses, max_deliveries=1),
        publisher(broker_url) as broker,
    ):
        for event in events:
            broker.publish_result(event)
        until(lambda: len(seen) == 3, SOON, "all deliveries")
    assert bring_back("work", broker_url=broker_url, limit=2) == 2
    assert depth(broker_url, "work") == 2
    assert depth(broker_url, "work.dead") == 1


def test_the_failures_of_all_consumers_of_a_queue_count_together(broker_url: str) -> None:
    bad, seen = event_of(ended_job()), list[Event]()
    with publisher(broker_url) as broker:
        for number in range(1, 4):
            with consuming(
                broker_url, "work", refusing(bad["id"], seen), max_deliveries=3, max_pause=3600
            ):
                if number == 1:
                    broker.publish_result(bad)
                until(lambda: len(seen) == number, SOON, "the next delivery")  # noqa: B023
    failures = [event.failure for event in seen]
    assert failures[0] is None
    assert failures[1] is not None
    assert failures[1].deliveries == 1
    assert failures[2] is not None
    assert failures[2].deliveries == 2
    assert depth(broker_url, "work.dead") == 1


def test_without_a_limit_a_refused_event_comes_for_ever(broker_url: str) -> None:
    bad, seen = event_of(ended_job()), list[Event]()
    with (
        consuming(
            broker_url, "work", refusing(bad["id"], seen), max_deliveries=None, max_pause=0.01
        ),
        publisher(broker_url) as broker,
    ):
        broker.publish_result(bad)
        until(lambda: len(seen) > 25, SOON, "more deliveries than the default allows")
    assert depth(broker_url, "work") == 1


def test_a_message_that_is_no_result_is_a_dead_letter_at_once(broker_url: str) -> None:
    seen: list[str] = []
    with (
        consuming(broker_url, "odd", lambda event: seen.append(event.id)),
        publisher(broker_url) as broker,
        Connection(broker_url) as connection,
    ):
        connection.Producer().publish({"hello": 1}, routing_key="odd")
        event = event_of(ended_job())
        broker.publish_result(event)
        until(lambda: seen, SOON, "the event after it")
    assert seen == [event["id"]]
    [letter] = take_all(broker_url, "odd.dead")
    assert json.loads(letter.body) == {"hello": 1}
    assert letter.headers["x-visq-error"] == "ValidationError"
