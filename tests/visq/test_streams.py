"""What Redis is told of ended jobs: the latest end, whatever comes late."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from visq.streams import EventWriter, StreamEvent, events_key, job_key


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def writer(client: redis.Redis) -> EventWriter:
    return EventWriter(client, ttl_seconds=60)


def ended(finished_at: str, job_id: str = "job_1", **fields: Any) -> dict[str, Any]:
    return {"id": job_id, "attempt": 1, "status": "failed", "finished_at": finished_at} | fields


def stored(client: redis.Redis, job_id: str = "job_1") -> Any:
    value: Any = client.get(job_key(job_id))
    return json.loads(value)


def ends(client: redis.Redis, job_id: str = "job_1") -> list[Any]:
    entries: Any = client.xrange(events_key(job_id))
    return [StreamEvent.from_fields(fields).job for _, fields in entries]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("2026-11-25T12:00:00.123456Z", "2026-11-25T12:00:00.123457Z"),
        ("2026-11-25T12:00:00Z", "2026-11-25T12:00:00.001Z"),
        ("2026-11-25T11:59:59.999Z", "2026-11-25T12:00:00Z"),
    ],
)
def test_the_late_event_of_an_earlier_end_does_not_replace_the_later_one(
    client: redis.Redis, writer: EventWriter, earlier: str, later: str
) -> None:
    first, second = ended(earlier), ended(later, status="succeeded", attempt=2)
    for job in (second, first):
        writer.end(job)
    assert stored(client) == second
    assert ends(client) == [second]
    client.flushall()
    for job in (first, second):
        writer.end(job)
    assert stored(client) == second
    assert ends(client) == [first, second]


def test_an_end_that_is_told_again_is_there_all_the_same(
    client: redis.Redis, writer: EventWriter
) -> None:
    job = ended("2026-11-25T12:00:00.5Z")
    writer.end(job)
    client.delete(job_key("job_1"), events_key("job_1"))  # Redis has lost it meanwhile
    writer.end(job)
    writer.end(job)
    assert stored(client) == job
    assert 0 < client.ttl(job_key("job_1")) <= 60
    assert 0 < client.ttl(events_key("job_1")) <= 60


def test_what_redis_refuses_of_one_job_harms_no_other(
    client: redis.Redis, writer: EventWriter
) -> None:
    client.set(events_key("job_1"), "this is no stream")
    client.set(job_key("job_2"), "this is no job")
    jobs = [ended("2026-11-25T12:00:00Z", f"job_{n}") for n in (1, 2, 3)]
    refused, *taken = writer.end_all(jobs)
    assert isinstance(refused, redis.ResponseError)
    assert taken == [None, None]
    assert stored(client, "job_2") == jobs[1]
    assert ends(client, "job_3") == [jobs[2]]


def test_nothing_to_tell_is_no_call(writer: EventWriter) -> None:
    assert writer.end_all([]) == []
