"""A job whose request or history this version cannot read: it has an end, as any other."""

from __future__ import annotations

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from models import groups, jobs
from models.tables import Job, Message
from tests.models.conftest import World
from visq.types import JobStatus as S

NEVER = 3600.0


def spoil_the_request(session: Session) -> None:
    session.execute(update(Job).values(request={"prompt": 5}))


def spoil_the_history(session: Session) -> None:
    session.execute(update(Message).values(role="oracle"))


@pytest.mark.parametrize("spoil", [spoil_the_request, spoil_the_history])
def test_it_is_a_dead_letter_after_its_attempts(world: World, spoil: object) -> None:
    first = world.submit(session={})
    world.succeed(first.id)
    job = world.submit(session_id=first.session_id)
    world.database.run(spoil)  # type: ignore[arg-type]
    for attempt in range(1, job.max_attempts + 1):
        assert world.claim(job.id) is None
        assert world.job(job.id).attempt == attempt
        world.database.run(lambda session: session.execute(update(Job).values(run_after=None)))
    dead = world.job(job.id)
    assert (dead.status, dead.error_code) == (S.FAILED, "internal_error")
    assert dead.dead_at is not None


def test_in_a_group_it_does_not_touch_the_others(world: World) -> None:
    bad, good = world.submit().id, world.submit().id
    world.database.run(
        lambda session: session.execute(
            update(Job).where(Job.id == bad).values(request={"prompt": 5})
        )
    )
    with pytest.raises(ValueError, match="validation"):  # the worker then claims each alone
        world.database.run(groups.claim_all, [bad, good], worker="worker-1", lease_seconds=NEVER)
    assert world.claim(bad) is None
    assert world.claim(good) is not None
    assert world.database.read(jobs.get, bad).status is S.QUEUED
