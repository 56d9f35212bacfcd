"""The token streams of many runs: every text whole, in order, and before the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis

from models.outcomes import Claim
from tests.waiting import until
from visq.streams import EventWriter, StreamEvent, StreamWrite, events_key, notify_channel
from worker import token_streams
from worker.token_streams import TokenStreams


def claim(number: int = 1, attempt: int = 1) -> Claim:
    return Claim(f"job_{number}", attempt, None)


class Watched(EventWriter):
    """Notes its round trips, and breaks when it is told to."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__(client, ttl_seconds=1000)
        self.client = client
        self.trips: list[int] = []
        self.away = False

    def write(self, writes: Sequence[StreamWrite]) -> list[redis.RedisError | None]:
        self.trips.append(len(writes))
        if self.away:
            raise redis.ConnectionError("away")
        return super().write(writes)

    def said(self, number: int = 1) -> list[StreamEvent]:
        entries: Any = self.client.xrange(events_key(f"job_{number}"))
        return [StreamEvent.from_fields(fields) for _, fields in entries]

    def text(self, number: int = 1, index: int = 0) -> str:
        said = self.said(number)
        return "".join(e.text for e in said if e.type == "token" and e.index == index)


@pytest.fixture
def events(redis_url: str) -> Iterator[Watched]:
    with redis.Redis.from_url(redis_url) as client:
        yield Watched(client)


@pytest.fixture
def streams(events: Watched) -> Iterator[TokenStreams]:
    streams = TokenStreams(events)
    streams.start()
    yield streams
    streams.close()


def test_the_attempt_and_the_texts_come_in_order_with_notes_and_a_ttl(
    streams: TokenStreams, events: Watched
) -> None:
    with events.client.pubsub(ignore_subscribe_messages=True) as notes:  # type: ignore[no-untyped-call]
        notes.subscribe(notify_channel("job_1"))
        notes.get_message(timeout=5)
        stream = streams.begin(claim(attempt=3))
        for word in ("a ", "black ", "cat"):
            streams.say(stream, 0, word)
        until(lambda: events.text() == "a black cat", 10, "the text")
        assert [note["data"] for note in iter(notes.get_message, None)][:1] == [b"attempt"]
    assert events.said()[0] == StreamEvent(type="attempt", attempt=3)
    assert {event.attempt for event in events.said()} == {3}
    assert 0 < int(events.client.ttl(events_key("job_1"))) <= 1000


def test_choices_are_kept_apart(streams: TokenStreams, events: Watched) -> None:
    stream = streams.begin(claim())
    for index, word in ((0, "a "), (1, "the "), (0, "cat"), (1, "dog")):
        streams.say(stream, index, word)
    streams.settle([stream])
    assert (events.text(index=0), events.text(index=1)) == ("a cat", "the dog")


def test_after_settle_nothing_of_a_run_waits_any_more(events: Watched) -> None:
    streams = TokenStreams(events)  # its thread does not run: only `settle` writes
    stream, other = streams.begin(claim(1)), streams.begin(claim(2))
    streams.say(stream, 0, "the last word")
    streams.say(other, 0, "not yet")
    streams.settle([stream])
    assert [event.type for event in events.said(1)] == ["attempt", "token"]
    assert events.said(2) == []
    streams.settle([stream])
    assert len(events.said(1)) == 2


def test_what_a_run_says_while_its_stream_is_written_keeps_its_order(
    streams: TokenStreams, events: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_streams, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(token_streams, "ROUND_SECONDS", 0.0)
    words = [f"{n} " for n in range(3000)]

    def speak(number: int) -> None:
        stream = streams.begin(claim(number))
        for word in words:
            streams.say(stream, 0, word)
        streams.settle([stream])
        events.end({"id": f"job_{number}", "attempt": 1})

    speakers = [threading.Thread(target=speak, args=(number,)) for number in range(4)]
    for speaker in speakers:
        speaker.start()
    for speaker in speakers:
        speaker.join()
    for number in range(4):
        assert events.text(number) == "".join(words)
        assert [event.type for event in events.said(number)].index("end") == (
            len(events.said(number)) - 1
        )


def test_texts_of_many_runs_go_together(events: Watched) -> None:
    streams = TokenStreams(events)
    for number in range(50):
        streams.say(streams.begin(claim(number)), 0, "a cat")
    streams.start()
    until(lambda: events.text(49) == "a cat", 10, "the texts")
    streams.close()
    assert events.trips == [100]


def test_after_a_failure_a_run_says_no_more_but_others_go_on(
    streams: TokenStreams, events: Watched
) -> None:
    broken = streams.begin(claim(1))
    events.away = True
    streams.say(broken, 0, "lost")
    streams.settle([broken])
    events.away = False
    streams.say(broken, 0, "after the gap")
    later = streams.begin(claim(2))
    streams.say(later, 0, "a cat")
    streams.settle([broken, later])
    assert "after" not in events.text(1)
    assert events.text(2) == "a cat"


def test_a_stream_that_redis_refuses_harms_no_other(streams: TokenStreams, events: Watched) -> None:
    events.client.set(events_key("job_1"), "not a stream")
    refused, kept = streams.begin(claim(1)), streams.begin(claim(2))
    streams.say(refused, 0, "a cat")
    streams.say(kept, 0, "a cat")
    streams.settle([refused, kept])
    assert refused.broken
    assert not kept.broken
    assert events.text(2) == "a cat"


def test_what_was_forgotten_is_not_written(events: Watched) -> None:
    streams = TokenStreams(events)
    lost = streams.begin(claim(1))
    streams.say(lost, 0, "of a lost run")
    streams.forget(lost)
    streams.settle([lost])
    assert events.said(1) == []
