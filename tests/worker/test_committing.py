"""Claims and ends of many runs at a time: together if possible, each with its own outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis
from sqlalchemy.orm import Session

from models import groups, jobs
from models.outcomes import Claim, Outcome, Transition, Work
from tests.models import conftest as of_models
from tests.models.conftest import PERMANENT, World, answered
from tests.waiting import until
from visq.errors import Unavailable
from visq.settings import Settings
from visq.streams import StreamEvent, events_key
from visq.types import JobStatus as S
from worker.committing import Committer
from worker.queue import Courier
from worker.token_streams import TokenStreams

R = TypeVar("R")

database = of_models.database
world = of_models.world


@pytest.fixture
def streams(courier: Courier) -> TokenStreams:
    return TokenStreams(courier.events)  # its thread does not run


@pytest.fixture
def courier(world: World, redis_url: str, tmp_path: Path) -> Iterator[Courier]:
    settings = Settings(data=tmp_path, broker_url=redis_url, redis_url=redis_url)
    courier = Courier(settings, world.database)
    yield courier
    courier.close()


@pytest.fixture
def committer(world: World, courier: Courier, streams: TokenStreams) -> Iterator[Committer]:
    committer = Committer(world.database, courier, streams, "worker-1", 30.0)
    yield committer
    committer.close()


def at_once(committer: Committer, *calls: Callable[[], R]) -> list[R | Exception]:
    """Make the calls in one group, and return what becomes of each."""
    held = [committer._claims, committer._ends, committer._deliveries]
    for grouped in held:
        grouped._changed.acquire()
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = []
        try:
            for call in calls:
                futures.append(pool.submit(call))
            # They wait for the lock that is held here: when it is free, all come at once.
            until(lambda: pool._work_queue.empty(), 10, "the threads")
        finally:
            for grouped in held:
                grouped._changed.release()
        return [future.exception() or future.result() for future in futures]  # type: ignore[misc]


def works(world: World, count: int) -> list[Work]:
    return [world.claimed(world.submit().id) for _ in range(count)]


def finishing(committer: Committer, work: Work, outcome: Outcome | None = None) -> Any:
    return lambda: committer.finish(work.claim, outcome or answered(work, "a cat"))


def test_every_message_of_a_crowd_is_claimed_once(
    world: World,
    committer: Committer,
) -> None:
    ids = [world.submit().id for _ in range(10)]
    claimed = at_once(committer, *(lambda id_=id_: committer.claim(id_) for id_ in ids * 2))
    got = [work.claim.job_id for work in claimed if isinstance(work, Work)]
    assert sorted(got) == sorted(ids)
    assert [each for each in claimed if not isinstance(each, Work)] == [None] * 10
    assert {world.job(id_).attempt for id_ in ids} == {1}


def test_ends_of_every_kind_in_one_group(world: World, committer: Committer) -> None:
    lost, failed, *rest = works(world, 6)
    world.finish(lost, PERMANENT)
    calls = [finishing(committer, lost), finishing(committer, failed, PERMANENT)]
    answers = at_once(committer, *calls, *(finishing(committer, work) for work in rest))
    assert answers[0] is None
    statuses = [each.job.status for each in answers[1:] if isinstance(each, Transition)]
    assert statuses == [S.FAILED, *[S.SUCCEEDED] * 4]


def test_a_job_that_breaks_its_group_gets_the_error_and_the_others_their_end(
    world: World,
    committer: Committer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, *good = works(world, 5)
    finish = jobs.finish

    def one_by_one(session: Session, claim: Claim, outcome: Outcome) -> Transition | None:
        if claim == bad.claim:
            raise ValueError("this one cannot be stored")
        return finish(session, claim, outcome)

    def broken(session: Session, ends: Any) -> Any:
        written = succeed_all(session, ends)  # all of it must be undone
        if bad.claim in written:
            raise ValueError("one of them cannot be stored")
        return written

    succeed_all = groups.succeed_all
    monkeypatch.setattr(jobs, "finish", one_by_one)
    monkeypatch.setattr(groups, "succeed_all", broken)
    answers = at_once(committer, *(finishing(committer, work) for work in [bad, *good]))
    assert isinstance(answers[0], ValueError)
    assert all(isinstance(each, Transition) for each in answers[1:])
    assert world.job(bad.claim.job_id).status is S.RUNNING
    for work in good:
        assert world.history(work.claim.job_id)[-2:] == [
            (S.QUEUED, S.RUNNING, 1),
            (S.RUNNING, S.SUCCEEDED, 1),
        ]


def test_a_database_that_is_away_is_not_asked_again_for_each_job(
    world: World,
    committer: Committer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def away(*_: object, **__: object) -> Any:
        asked.append(1)
        raise Unavailable("away")

    crowd = works(world, 5)
    monkeypatch.setattr(world.database, "run", away)
    answers = at_once(committer, *(finishing(committer, work) for work in crowd))
    assert all(isinstance(each, Unavailable) for each in answers)
    assert len(asked) <= 2  # the first of them may have been alone


def test_the_last_token_comes_before_the_end(
    world: World,
    committer: Committer,
    courier: Courier,
    streams: TokenStreams,
) -> None:
    crowd = works(world, 4)
    said = {work.claim: streams.begin(work.claim) for work in crowd}
    for stream in said.values():
        streams.say(stream, 0, "the last word")
    ended = at_once(committer, *(finishing(committer, work) for work in crowd))
    deliveries = [
        (lambda one=one, work=work: committer.deliver(said[work.claim], one))
        for one, work in zip(ended, crowd, strict=True)
    ]
    assert at_once(committer, *deliveries) == [None] * 4
    for work in crowd:
        entries: Any = courier.redis.xrange(events_key(work.claim.job_id))
        events = [StreamEvent.from_fields(fields) for _, fields in entries]
        assert [event.type for event in events] == ["attempt", "token", "end"]
    with redis.Redis.from_url(courier._settings.redis) as client:
        assert client.exists(*(f"visq:job:{work.claim.job_id}" for work in crowd)) == 4


def test_a_delivery_that_breaks_leaves_the_others_theirs(
    world: World,
    committer: Committer,
    streams: TokenStreams,
    courier: Courier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, *good = works(world, 3)
    ended = at_once(committer, *(finishing(committer, work) for work in [bad, *good]))
    publish = courier.broker.publish_result

    def broken(event: dict[str, Any], **options: Any) -> None:
        if event["subject"] == bad.claim.job_id:
            raise TypeError("a bug")
        publish(event, **options)

    monkeypatch.setattr(courier.broker, "publish_result", broken)
    stream = streams.begin(bad.claim)
    answers = at_once(committer, *(lambda one=one: committer.deliver(stream, one) for one in ended))
    assert [type(answer) for answer in answers] == [TypeError, type(None), type(None)]


def test_an_urgent_claim_waits_for_no_group(world: World, committer: Committer) -> None:
    job_id = world.submit().id
    with committer._claims._changed:  # no group can begin
        work = committer.claim(job_id, urgent=True)
    assert work is not None
    assert work.claim.job_id == job_id
    assert world.job(job_id).status is S.RUNNING
