"""A job's life: every transition, and the writes that must not happen."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from models import dispatch, jobs, leases, moves, outbox
from models.outcomes import Cancelled, Expired, Failed, HandedBack
from models.tables import Job
from tests.models.conftest import PERMANENT, TRANSIENT, World, answered
from tests.waiting import until
from visq.errors import EngineCrashed, NotRetriable
from visq.types import JobStatus as S

NEVER = 3600.0


def test_a_submitted_job_is_claimed_and_succeeds(world: World) -> None:
    job = world.submit(prompt="what is this?")
    transition = world.succeed(job.id, "a cat")

    assert transition.job.status is S.SUCCEEDED
    assert transition.job.result is not None
    assert transition.job.result["text"] == "a cat"
    assert world.history(job.id) == [
        (None, S.QUEUED, 0),
        (S.QUEUED, S.RUNNING, 1),
        (S.RUNNING, S.SUCCEEDED, 1),
    ]


def test_a_job_is_claimed_by_one_of_many_workers(world: World) -> None:
    job = world.submit()
    start = threading.Barrier(8)
    claims = []

    def work() -> None:
        start.wait()
        claims.append(world.claim(job.id))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(claim is not None for claim in claims) == 1


def test_a_repeated_message_for_an_ended_job_finds_nothing_to_claim(world: World) -> None:
    job = world.submit()
    world.succeed(job.id)
    assert world.claim(job.id) is None


def test_an_older_attempt_writes_nothing_once_a_newer_one_runs(world: World) -> None:
    job = world.submit()
    old = world.claimed(job.id, lease_seconds=-1)
    world.database.run(leases.rescue, job.id, backoff_seconds=0.0)
    new = world.claimed(job.id)

    assert world.finish(old, answered(old, "late")) is None
    assert world.finish(new, answered(new, "right")) is not None
    assert world.finish(old, PERMANENT) is None
    ended = world.job(job.id)
    assert ended.attempt == 2
    assert ended.result is not None
    assert ended.result["text"] == "right"


def test_the_same_end_written_twice_takes_effect_once(world: World) -> None:
    work = world.claimed(world.submit().id)
    assert world.finish(work, answered(work, "a cat")) is not None
    assert world.finish(work, answered(work, "a cat")) is None


def test_a_retryable_error_leads_to_another_attempt_until_they_are_used_up(world: World) -> None:
    job = world.submit()
    for _ in range(3):
        assert world.finish(world.claimed(job.id), TRANSIENT) is not None
    ended = world.job(job.id)
    assert ended.status is S.FAILED
    assert ended.error_code == "image_fetch_failed"
    assert ended.attempt == 3
    assert ended.dead_at is not None, "it is a dead letter"


def test_the_back_off_keeps_a_job_from_being_claimed_early(world: World) -> None:
    job = world.submit()
    later = type(TRANSIENT)(TRANSIENT.error, backoff_seconds=NEVER)
    world.finish(world.claimed(job.id), later)
    assert world.job(job.id).status is S.QUEUED
    assert world.claim(job.id) is None


def test_an_error_that_will_not_pass_fails_the_job_at_once(world: World) -> None:
    job = world.submit()
    world.finish(world.claimed(job.id), PERMANENT)
    failed = world.job(job.id)
    assert (failed.status, failed.error_code) == (S.FAILED, "image_not_found")
    assert failed.error_message is not None
    assert "s3://a-bucket/cat.png" in failed.error_message
    assert failed.dead_at is None, "trying again would not help"


def test_a_job_that_is_handed_back_loses_no_attempt(world: World) -> None:
    job = world.submit()
    for attempt in range(1, 6):
        work = world.claimed(job.id)
        assert work.claim.attempt == attempt
        transition = world.finish(work, HandedBack("shutdown"))
        assert transition is not None
        assert [queued.id for queued in transition.queued] == [job.id]
    assert world.job(job.id).failures == 0


def test_a_cancelled_job_that_is_handed_back_ends(world: World) -> None:
    work = world.claimed(world.submit().id)
    world.database.run(jobs.cancel, work.claim.job_id)
    ended = world.finish(work, HandedBack("shutdown"))
    assert ended is not None
    assert ended.job.status is S.CANCELLED
    assert len(ended.events) == 1


def test_the_back_off_does_not_grow_beyond_all_measure(world: World) -> None:
    job = world.submit()

    def many_failures(session: Session) -> None:
        session.execute(update(Job).values(failures=97, max_attempts=100))

    world.database.run(many_failures)
    world.finish(world.claimed(job.id), Failed(EngineCrashed("the engine died")))
    queued = world.job(job.id)
    assert queued.run_after is not None
    assert queued.publish_at is not None
    assert queued.run_after - queued.created_at < timedelta(seconds=2 * moves.LONGEST_BACKOFF)


def test_a_renewed_lease_is_not_rescued_and_a_run_out_one_is(world: World) -> None:
    held, dead = world.submit().id, world.submit().id
    claim = world.claimed(held, lease_seconds=-1).claim
    world.claimed(dead, lease_seconds=-1)
    [renewed] = world.database.run(jobs.renew, [claim], lease_seconds=NEVER)

    assert renewed.claim == claim
    assert world.database.read(leases.without_lease, 10) == [dead]
    assert world.database.run(leases.rescue, held) is None
    assert world.database.run(leases.rescue, dead, backoff_seconds=0.0) is not None
    assert world.statuses() == [S.RUNNING, S.QUEUED]


def test_a_lost_claim_is_not_renewed(world: World) -> None:
    job = world.submit()
    old = world.claimed(job.id, lease_seconds=-1)
    world.database.run(leases.rescue, job.id, backoff_seconds=0.0)
    world.claimed(job.id)
    assert world.database.run(jobs.renew, [old.claim], lease_seconds=NEVER) == []


def test_a_retried_job_has_as_much_time_as_it_had_at_first(world: World) -> None:
    job = world.submit(expires_in=60)
    world.finish(world.claimed(job.id), PERMANENT)

    def long_ago(session: Session) -> None:
        past = timedelta(hours=1)
        session.execute(
            update(Job).values(created_at=job.created_at - past, expires_at=job.expires_at - past)
        )

    assert job.expires_at is not None
    world.database.run(long_ago)
    world.database.run(jobs.retry, job.id)
    assert world.database.read(jobs.past_deadline, 10) == []
    retried = world.job(job.id)
    assert retried.expires_at is not None
    assert abs(retried.expires_at - job.expires_at) < timedelta(seconds=30)


def test_a_queued_job_is_cancelled_at_once(world: World) -> None:
    job = world.submit()
    assert world.database.run(jobs.cancel, job.id).job.status is S.CANCELLED
    assert world.claim(job.id) is None


def test_a_running_job_learns_of_its_cancellation_at_the_next_renewal(world: World) -> None:
    work = world.claimed(world.submit().id)
    assert world.database.run(jobs.cancel, work.claim.job_id).job.status is S.RUNNING
    [renewed] = world.database.run(jobs.renew, [work.claim], lease_seconds=NEVER)
    assert renewed.cancel_requested
    ended = world.finish(work, Cancelled())
    assert ended is not None
    assert ended.job.status is S.CANCELLED


def test_cancelling_an_ended_job_changes_nothing(world: World) -> None:
    job = world.submit()
    world.succeed(job.id)
    assert world.database.run(jobs.cancel, job.id).job.status is S.SUCCEEDED


def test_a_cancelled_job_of_a_dead_worker_is_not_run_again(world: World) -> None:
    work = world.claimed(world.submit().id, lease_seconds=-1)
    world.database.run(jobs.cancel, work.claim.job_id)
    rescued = world.database.run(leases.rescue, work.claim.job_id)
    assert rescued is not None
    assert rescued.job.status is S.CANCELLED


def test_a_retryable_error_after_a_cancellation_does_not_queue_the_job(world: World) -> None:
    work = world.claimed(world.submit().id)
    world.database.run(jobs.cancel, work.claim.job_id)
    ended = world.finish(work, TRANSIENT)
    assert ended is not None
    assert ended.job.status is S.CANCELLED


def test_a_job_past_its_deadline_is_not_claimed_but_expires(world: World) -> None:
    job = world.submit(expires_in=0.001)
    until(lambda: world.database.read(jobs.past_deadline, 10) == [job.id], 5, "the deadline")
    assert world.claim(job.id) is None
    expired = world.database.run(jobs.expire, job.id)
    assert expired is not None
    assert expired.job.status is S.EXPIRED


def test_a_job_before_its_deadline_does_not_expire(world: World) -> None:
    job = world.submit(expires_in=NEVER)
    assert world.database.run(jobs.expire, job.id) is None
    work = world.claimed(job.id)
    assert work.expires_in is not None
    assert NEVER - 60 < work.expires_in <= NEVER


def test_a_running_job_may_end_as_expired(world: World) -> None:
    work = world.claimed(world.submit().id)
    ended = world.finish(work, Expired())
    assert ended is not None
    assert ended.job.status is S.EXPIRED


def test_only_a_failed_job_is_retried_by_a_call(world: World) -> None:
    job = world.submit()
    with pytest.raises(NotRetriable, match="is queued"):
        world.database.run(jobs.retry, job.id)
    world.finish(world.claimed(job.id), PERMANENT)
    retried = world.database.run(jobs.retry, job.id)

    assert [queued.id for queued in retried.queued] == [job.id]
    assert world.succeed(job.id).job.error_code is None
    assert world.history(job.id)[-3:] == [
        (S.FAILED, S.QUEUED, 1),
        (S.QUEUED, S.RUNNING, 2),
        (S.RUNNING, S.SUCCEEDED, 2),
    ]


def test_each_end_leaves_one_event_with_the_job_in_the_outbox(world: World) -> None:
    job = world.submit(result_queue="mine")
    [entry] = world.succeed(job.id, "a cat").events

    assert entry.payload["id"] == entry.id
    assert entry.payload["type"] == "visq.job.succeeded"
    assert entry.payload["data"]["result"]["text"] == "a cat"
    assert entry.payload["data"]["result_queue"] == "mine"
    world.database.run(outbox.done, [entry.id])
    assert world.database.run(outbox.reserve, 10) == []


def test_an_outbox_entry_that_nobody_published_is_reserved_once_it_is_due(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "GRACE_SECONDS", 0.0)
    [entry] = world.succeed(world.submit().id).events
    assert [each.id for each in world.database.run(outbox.reserve, 10)] == [entry.id]
    assert world.database.run(outbox.reserve, 10) == [], "reserved entries are left to their taker"


def due(world: World, republish_seconds: float = NEVER) -> list[str]:
    reserved = world.database.run(
        dispatch.reserve_due, limit=100, republish_seconds=republish_seconds
    )
    return [each.job.id for each in reserved]


def test_a_queued_job_that_was_not_published_becomes_due(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert due(world) == []
    monkeypatch.setattr("models.submit.PUBLISH_GRACE_SECONDS", 0.0)
    job = world.submit()
    assert due(world) == [job.id]
    assert due(world) == [], "a reserved job is due again only after the republish time"


def test_a_published_job_is_published_again_until_it_is_claimed(world: World) -> None:
    job = world.submit()
    world.database.run(dispatch.mark_published, [job.id], republish_seconds=-1)
    assert due(world, republish_seconds=-1) == [job.id]
    assert due(world, republish_seconds=-1) == [job.id]
    world.claimed(job.id)
    assert due(world, republish_seconds=-1) == []


def test_times_are_of_the_databases_clock_and_in_utc(world: World) -> None:
    job: Job = world.job(world.submit(expires_in=60).id)
    assert job.created_at.utcoffset() == timedelta(0)
    assert job.expires_at is not None
    assert abs(job.expires_at - job.created_at - timedelta(seconds=60)) < timedelta(seconds=1)
