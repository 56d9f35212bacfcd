"""What runs all the time finds its rows by partial indexes: jobs that have ended cost it nothing.

`bench.full_table` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from bench.full_table_rows import Rows
from migrations import run as migrations
from models import batch_windows, batches, checkup, dead_letters, dispatch, jobs, leases, reading
from models.database import Database
from tests.models.conftest import World
from tests.servers import PostgreSQL


@pytest.fixture(scope="module")
def full(servers_dir: Path) -> Iterator[World]:
    """20,000 ended jobs in PostgreSQL, and some of every kind that have not ended."""
    with PostgreSQL(servers_dir / "full") as server:
        url = server.create_database()
        migrations.upgrade(url)
        database = Database(url)
        rows = Rows(database)
        rows.fill(20_000)
        world = World(database, database.run(reading.ensure_tenants, ["acme"])["acme"])
        first = world.submit(session={})
        world.submit(session_id=first.session_id)
        world.claimed(world.submit(expires_in=60).id)
        for batch_id in (_open_batch(world), _cancelling_batch(world)):
            rows.end_more_of(batch_id, 5_000, like="abc")
        rows.analyze(vacuum=True)
        yield world
        database.close()


def _open_batch(world: World) -> str:
    same = [{"custom_id": f"{n}", "prompt": "the same"} for n in range(50)]
    return world.submit_batch(50, items=same, dedupe=True)


def _cancelling_batch(world: World) -> str:
    batch_id = world.submit_batch(50)
    world.database.run(batches.request_cancel, batch_id)
    return batch_id


def plans(database: Database, call: Callable[[], object]) -> list[str]:
    """How the database runs the SELECTs of `call`."""
    found: list[str] = []
    is_sqlite = database.engine.dialect.name == "sqlite"
    how = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"

    def explain(connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            cursor = connection.connection.driver_connection.cursor()
            plan = cursor.execute(f"{how} {statement}", values).fetchall()
            found.append("\n".join(str(line[-1]) for line in plan))

    event.listen(database.engine, "before_cursor_execute", explain)
    try:
        call()
    finally:
        event.remove(database.engine, "before_cursor_execute", explain)
    return found


@pytest.mark.parametrize(
    ("function", "arguments", "index"),
    [
        (jobs.past_deadline, (200,), "ix_jobs_deadlines"),
        (leases.without_lease, (200,), "ix_jobs_leases"),
        (batches.to_cancel, (200,), "ix_jobs_open_items"),
        (batch_windows.fill_windows, (100,), "ix_jobs_held"),
        (batch_windows.fill_windows, (100,), "ix_jobs_dedupe_open"),
        (batch_windows.fill_windows, (100,), "ix_jobs_dedupe_answered"),
        (dispatch.in_broker, (), "ix_jobs_"),
        (
            partial(dispatch.reserve_due, limit=200, republish_seconds=60.0),
            (),
            "ix_jobs_unpublished",
        ),
        (partial(reading.answered_before, dedupe_key="abc", job_id="job_"), ("bat_",), "ix_jobs_"),
        (dead_letters.count_by_error, (), "ix_jobs_dead"),
        (partial(dead_letters.page, limit=50), (), "ix_jobs_dead"),
        (
            partial(checkup.look, late_seconds=30.0, untold_seconds=30.0),
            (),
            "ix_job_events_job_id_id",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if value == str(value) else ""),
)
def test_jobs_that_have_ended_are_not_read(
    full: World, function: Callable[..., Any], arguments: tuple[Any, ...], index: str
) -> None:
    found = plans(full.database, lambda: full.database.run(function, *arguments))
    assert any(index in plan for plan in found), found
    of_jobs = [plan for plan in found if "Seq Scan on job" in plan or "pk_jobs" in plan]
    assert of_jobs == []


@pytest.fixture(scope="module")
def full_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    url = f"sqlite:///{tmp_path_factory.mktemp('full') / 'visq.db'}"
    migrations.upgrade(url)
    database = Database(url)
    rows = Rows(database)
    rows.fill(20_000)
    world = World(database, database.run(reading.ensure_tenants, ["acme"])["acme"])
    world.submit()
    _cancelling_batch(world)
    rows.end_more_of(_open_batch(world), 5_000, like="abc")
    rows.analyze()
    yield world
    database.close()


@pytest.mark.parametrize(
    "call",
    [
        partial(batch_windows.fill_windows, most=100),
        partial(batches.to_cancel, limit=200),
        partial(jobs.past_deadline, limit=200),
        partial(leases.without_lease, limit=200),
        partial(dispatch.reserve_due, limit=200, republish_seconds=60.0),
        partial(checkup.look, late_seconds=30.0, untold_seconds=30.0),
    ],
    ids=lambda call: call.func.__name__,
)
def test_sqlite_does_not_read_them_either(full_sqlite: World, call: Callable[..., Any]) -> None:
    found = plans(full_sqlite.database, lambda: full_sqlite.database.run(call))
    assert any("ix_jobs_" in plan for plan in found)
    for plan in found:
        assert "SCAN jobs USING INDEX sqlite_autoindex" not in plan
        assert "SCAN jobs\n" not in f"{plan}\n"
        assert "ix_jobs_batch_id_position" not in plan
