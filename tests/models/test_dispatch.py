"""Which jobs are published first, and that finding them reads no others."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event, text, update
from sqlalchemy.orm import Session

from models import dispatch, jobs
from models.database import db_now
from models.tables import Job
from tests.models.conftest import World

NEVER = 3600.0


def make_due(world: World, ids: list[str], publishes: int, ago: float) -> None:
    """These jobs have been due for `ago` seconds, and were published so often."""
    world.database.run(
        lambda session: session.execute(
            update(Job)
            .where(Job.id.in_(ids))
            .values(publishes=publishes, publish_at=db_now(-ago), batch_id=None)
        )
    )


def waiting(world: World, count: int) -> list[str]:
    world.submit_batch(count)
    return list(world.database.read(lambda session: session.scalars(text(ALL_JOBS)).all()))


ALL_JOBS = "SELECT id FROM jobs ORDER BY id"


def reserve(world: World, limit: int) -> list[str]:
    due = world.database.run(dispatch.reserve_due, limit=limit, republish_seconds=NEVER)
    return [each.job.id for each in due]


def test_a_retry_goes_before_any_number_of_repeats_that_are_due_for_longer(world: World) -> None:
    *repeats, retry = waiting(world, 31)
    make_due(world, repeats, publishes=2, ago=60)
    make_due(world, [retry], publishes=0, ago=1)
    first = reserve(world, 10)
    assert retry in first
    assert len(first) == 10, "repeats have the room that is left"
    assert sorted(first + reserve(world, 100)) == sorted([*repeats, retry])


def test_repeats_wait_while_first_publications_fill_a_round(world: World) -> None:
    jobs = waiting(world, 12)
    make_due(world, jobs[:4], publishes=1, ago=60)
    make_due(world, jobs[4:], publishes=0, ago=1)
    assert reserve(world, 8) == jobs[4:]
    assert reserve(world, 8) == jobs[:4]


def test_what_could_not_be_published_stays_what_it_was(world: World) -> None:
    repeat, first = waiting(world, 2)
    make_due(world, [repeat], publishes=3, ago=60)
    make_due(world, [first], publishes=0, ago=60)
    for _ in range(2):
        due = world.database.run(dispatch.reserve_due, limit=10, republish_seconds=NEVER)
        assert [(each.job.id, each.publishes) for each in due] == [(repeat, 4), (first, 1)]
        world.database.run(dispatch.publish_again_now, [repeat, first], seconds=-1)


def test_first_publications_are_found_by_an_index_of_their_own(world: World) -> None:
    *repeats, retry = waiting(world, 2000)
    make_due(world, repeats, publishes=2, ago=60)
    make_due(world, [retry], publishes=0, ago=1)
    with world.database.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("ANALYZE"))
    looks: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.lstrip().startswith("SELECT jobs.id"):
            looks.append((statement, parameters))

    event.listen(world.database.engine, "before_cursor_execute", note)
    reserve(world, 10)
    event.remove(world.database.engine, "before_cursor_execute", note)
    first, repeated = looks
    assert "ix_jobs_unpublished" in plan(world, *first)
    assert "ix_jobs_to_publish" in plan(world, *repeated)


def test_passed_deadlines_are_found_among_the_few_jobs_that_have_not_ended(world: World) -> None:
    waiting(world, 2000)
    with world.database.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("ANALYZE"))
    looks: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.lstrip().startswith("SELECT jobs.id"):
            looks.append((statement, parameters))

    event.listen(world.database.engine, "before_cursor_execute", note)
    world.database.read(jobs.past_deadline, 10)
    event.remove(world.database.engine, "before_cursor_execute", note)
    [look] = looks
    assert "ix_jobs_deadlines" in plan(world, *look)


def plan(world: World, statement: str, parameters: Any) -> str:
    explain = "EXPLAIN QUERY PLAN" if "sqlite" in str(world.database.engine.url) else "EXPLAIN"

    def ask(session: Session) -> str:
        rows = session.connection().exec_driver_sql(f"{explain} {statement}", parameters)
        return "\n".join(str(row) for row in rows)

    return world.database.run(ask)
