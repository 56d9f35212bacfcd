"""Tenants see only their own rows; both faces of the database run the same functions."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.exc import DataError
from sqlalchemy.orm import Session

from migrations import run as migrations
from models import jobs, outages, reading
from models.database import AsyncDatabase, Database
from models.outcomes import Cancelled, Claim
from models.tables import Job, Tenant
from tests.models.conftest import World, answered
from visq.errors import ConfigurationError, NotFound, Unavailable


async def test_every_orm_statement_of_a_tenant_is_scoped_to_it(
    world: World, database_url: str
) -> None:
    job = world.submit()
    other = world.database.run(reading.ensure_tenants, ["other"])["other"]
    database = AsyncDatabase(database_url)

    def touch(session: Session) -> list[int]:
        changed = session.execute(update(Job).values(meta={"seen": "yes"}))
        removed = session.execute(delete(Job))
        counted = session.scalar(select(func.count()).select_from(Job))
        columns = session.execute(select(Job.id)).all()
        return [changed.rowcount, removed.rowcount, counted or 0, len(columns)]  # type: ignore[attr-defined]

    mine, foreign = database.for_tenant(world.tenant_id), database.for_tenant(other)
    assert await foreign.run(touch) == [0, 0, 0, 0]
    with pytest.raises(NotFound):
        await foreign.run(jobs.cancel, job.id)
    assert (await mine.read(jobs.get, job.id)).id == job.id
    assert (await database.read(jobs.get, job.id)).meta == {}
    await database.close()


async def test_transitions_of_a_tenant_are_scoped_to_it(world: World, database_url: str) -> None:
    first = world.submit(session={})
    second = world.submit(session_id=first.session_id)
    other = world.database.run(reading.ensure_tenants, ["other"])["other"]
    database = AsyncDatabase(database_url)
    mine, foreign = database.for_tenant(world.tenant_id), database.for_tenant(other)

    assert await foreign.run(jobs.claim, first.id, worker="w", lease_seconds=30) is None
    work = await mine.run(jobs.claim, first.id, worker="w", lease_seconds=30)
    assert work is not None
    assert await foreign.run(jobs.renew, [work.claim], lease_seconds=30) == []
    lost = Claim(first.id, work.claim.attempt, None)
    assert await foreign.run(jobs.finish, lost, Cancelled()) is None
    ended = await mine.run(jobs.finish, work.claim, answered(work, "a cat"))
    assert ended is not None
    assert [queued.id for queued in ended.queued] == [second.id]
    assert (await mine.run(jobs.cancel, second.id)).job.status == "cancelled"
    assert world.statuses() == ["succeeded", "cancelled"]
    await database.close()


async def test_an_error_rolls_the_whole_transaction_back(world: World, database_url: str) -> None:
    job = world.submit()

    def cancel_then_fail(session: Session) -> None:
        jobs.cancel(session, job.id)
        raise RuntimeError("after the cancel")

    with pytest.raises(RuntimeError):
        world.database.run(cancel_then_fail)
    database = AsyncDatabase(database_url)
    with pytest.raises(RuntimeError):
        await database.run(cancel_then_fail)
    await database.close()
    assert world.job(job.id).status == "queued"


def test_reading_does_not_wait_for_a_writer(world: World, database_url: str) -> None:
    job = world.submit()
    reader = Database(database_url)

    def read_beside(session: Session) -> str:
        jobs.cancel(session, job.id)
        return reader.read(jobs.get, job.id).status

    assert world.database.run(read_beside) == "queued"
    reader.close()


def test_a_read_only_transaction_on_sqlite_refuses_to_upgrade_silently(sqlite_url: str) -> None:
    migrations.upgrade(sqlite_url)
    database, writer = Database(sqlite_url), Database(sqlite_url)

    def write_late(session: Session) -> None:
        session.execute(select(Job.id)).all()
        writer.run(reading.ensure_tenants, ["between"])
        reading.ensure_tenants(session, ["late"])

    with pytest.raises(Unavailable) as raised:
        database.read(write_late)
    assert "locked" in str(raised.value.__cause__)
    database.close()
    writer.close()


def lock_both(session: Session, names: list[str], met: threading.Barrier, runs: list[int]) -> None:
    """Lock two rows, in this order; the first time, the other order is under way as well."""
    runs.append(1)
    for name in names:
        session.scalars(select(Tenant).where(Tenant.name == name).with_for_update()).one()
        if name == names[0] and len(runs) == 1:
            met.wait(10)
    session.execute(update(Tenant).where(Tenant.name == names[0]).values(name=names[0]))


def test_the_one_that_a_deadlock_hits_is_run_again(postgres_url: str) -> None:
    migrations.upgrade(postgres_url)
    database = Database(postgres_url)
    names = ["one", "two"]
    database.run(reading.ensure_tenants, names)
    met = threading.Barrier(2)
    runs: tuple[list[int], list[int]] = [], []
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(database.run, lock_both, order, met, count)
            for order, count in zip((names, names[::-1]), runs, strict=True)
        ]
        assert [each.result() for each in both] == [None, None]
    assert sorted(map(len, runs)) == [1, 2]
    database.close()


async def test_the_one_that_a_deadlock_hits_is_run_again_in_the_event_loop(
    postgres_url: str,
) -> None:
    migrations.upgrade(postgres_url)
    other = Database(postgres_url)
    names = ["one", "two"]
    other.run(reading.ensure_tenants, names)
    met = threading.Barrier(2)
    runs: tuple[list[int], list[int]] = [], []

    def in_a_loop_of_its_own() -> None:
        async def run() -> None:
            mine = AsyncDatabase(postgres_url)
            await mine.run(lock_both, names, met, runs[0])
            await mine.close()

        asyncio.run(run())

    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(in_a_loop_of_its_own))
        group.create_task(asyncio.to_thread(other.run, lock_both, names[::-1], met, runs[1]))
    assert sorted(map(len, runs)) == [1, 2]
    other.close()


def test_what_others_roll_back_again_and_again_is_an_outage_and_not_a_bug(
    postgres_url: str,
) -> None:
    """The API answers 503 and not 500; a worker tries again to write the end of its run."""
    database = Database(postgres_url)
    runs = []

    def roll_back(session: Session) -> None:
        runs.append(1)
        session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

    with pytest.raises(Unavailable):
        database.run(roll_back)
    assert len(runs) == 1 + outages.REPEATS
    database.close()


def test_what_the_driver_cannot_send_is_a_bug_and_not_an_outage(postgres_url: str) -> None:
    """Nobody tries it again: a run whose end has such a value would never end."""
    database = Database(postgres_url)
    with pytest.raises(DataError):
        database.run(lambda session: session.execute(text("SELECT :a"), {"a": "a\0b"}))
    database.close()


def test_a_database_that_does_not_answer_is_unavailable() -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(Unavailable):
        database.ping()
    database.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://localhost/x"])
def test_a_database_that_visq_cannot_use_is_refused_with_a_reason(url: str) -> None:
    with pytest.raises(ConfigurationError, match="VISQ_DATABASE_URL"):
        Database(url)
