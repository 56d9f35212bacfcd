"""A job with which engines or workers died: nobody is blamed for another's death."""

from __future__ import annotations

import pytest

from models import dispatch, groups, jobs, leases, moves
from models.outcomes import QueuedJob, Transition, Work
from tests.models.conftest import CRASHED, World, answered
from visq.types import JobStatus as S

NEVER = 3600.0


def claim_alone(world: World, job_id: str, lease_seconds: float = NEVER) -> Work | None:
    return world.database.run(
        jobs.claim, job_id, worker="worker-1", lease_seconds=lease_seconds, alone=True
    )


def die(world: World, job_id: str, how: str, *, alone: bool) -> Transition:
    """The engine, or the worker, dies with the job."""
    lease_seconds = NEVER if how == "engine" else -1.0
    work = (
        claim_alone(world, job_id, lease_seconds) if alone else world.claim(job_id, lease_seconds)
    )
    assert work is not None
    if how == "engine":
        transition = world.finish(work, CRASHED)
    else:
        transition = world.database.run(leases.rescue, job_id, backoff_seconds=0.0)
    assert transition is not None
    return transition


@pytest.mark.parametrize("how", ["engine", "worker"])
def test_a_job_that_was_there_at_two_deaths_is_not_blamed_but_runs_alone_from_then_on(
    world: World, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "PUBLISH_GRACE_SECONDS", 0.0)
    job = world.submit()
    for _ in range(moves.SHARED_CRASHES):
        assert claim_alone(world, job.id) is None
        die(world, job.id, how, alone=False)
    suspect = world.job(job.id)
    assert (suspect.failures, suspect.crashes) == (0, 2)
    assert world.claim(job.id) is None
    [due] = world.database.run(dispatch.reserve_due, limit=10, republish_seconds=-1.0)
    assert due.job == QueuedJob(job.id, job.lane, alone=True)
    assert world.database.run(jobs.stop_for, job.id, seconds=NEVER)
    again = world.database.run(dispatch.reserve_due, limit=10, republish_seconds=NEVER)
    assert again == [], "one worker stops for it: the others need not"
    work = claim_alone(world, job.id)
    assert work is not None
    assert world.finish(work, answered(work, "a cat")) is not None
    assert world.job(job.id).status is S.SUCCEEDED


@pytest.mark.parametrize(
    ("how", "code"), [("engine", "engine_crashed"), ("worker", "attempts_exhausted")]
)
def test_a_job_that_kills_while_it_is_alone_ends_as_a_dead_letter(
    world: World, how: str, code: str
) -> None:
    job = world.submit()
    for number in range(moves.SHARED_CRASHES + job.max_attempts):
        assert world.job(job.id).status is S.QUEUED
        die(world, job.id, how, alone=number >= moves.SHARED_CRASHES)
    dead = world.job(job.id)
    assert (dead.status, dead.error_code) == (S.FAILED, code)
    assert dead.dead_at is not None
    assert dead.failures == dead.max_attempts


def test_a_dead_letter_that_is_retried_is_still_alone_and_has_all_its_attempts(
    world: World,
) -> None:
    job = world.submit()
    for number in range(moves.SHARED_CRASHES + job.max_attempts):
        die(world, job.id, "engine", alone=number >= moves.SHARED_CRASHES)
    [queued] = world.database.run(jobs.retry, job.id).queued
    assert queued.alone
    retried = world.job(job.id)
    assert (retried.status, retried.failures, retried.dead_at) == (S.QUEUED, 0, None)
    assert world.claim(job.id) is None
    assert claim_alone(world, job.id) is not None


def test_a_suspect_is_left_out_of_a_group_of_claims(world: World) -> None:
    suspect, other = world.submit().id, world.submit().id
    for _ in range(moves.SHARED_CRASHES):
        die(world, suspect, "engine", alone=False)
    works = world.database.run(
        groups.claim_all, [suspect, other], worker="worker-1", lease_seconds=NEVER
    )
    assert works[suspect] is None
    assert works[other] is not None
