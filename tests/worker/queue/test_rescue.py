"""Whose jobs are taken after an outage of the database: dead workers', and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

from migrations import run as migrations
from models import leases, reading
from models.database import Database
from tests.models.conftest import World
from tests.servers import PostgreSQL
from tests.waiting import until
from visq.settings import Settings
from visq.streams import WorkerInfo
from visq.types import JobStatus
from worker.queue import Courier, Maintenance
from worker.runs import Runs

LEASE, HEARTBEAT = 2.0, 1.0
INFO = WorkerInfo(
    id="w", model="m", engine="e", device="cpu", dtype="-", concurrency=1, in_flight=0
)


@pytest.fixture
def own_postgres(servers_dir: Path) -> Iterator[PostgreSQL]:
    """A server that this test may stop."""
    with PostgreSQL(servers_dir / "postgres-of-rescue") as server:
        yield server


@contextmanager
def process(
    url: str, redis_url: str, folder: Path, heartbeat: float = HEARTBEAT
) -> Iterator[tuple[Runs, Maintenance]]:
    """What looks after leases in a worker; its threads run only if they are started."""
    settings = Settings(
        data=folder,
        broker_url=redis_url,
        redis_url=redis_url,
        lease_seconds=LEASE,
        heartbeat_seconds=heartbeat,
        maintenance_seconds=0.05,
    )
    database = Database(url)
    courier = Courier(settings, database)
    runs = Runs(settings, database, courier.redis, lambda in_flight: INFO)
    maintenance = Maintenance(settings, database, courier)
    yield runs, maintenance
    maintenance.stop()
    runs.close()
    courier.close()
    database.close()


def out_of_lease(world: World) -> list[str]:
    return world.database.read(leases.without_lease, 10)


@pytest.mark.timeout(120)
def test_an_outage_longer_than_the_lease_costs_living_workers_no_run_and_hides_no_dead_one(
    own_postgres: PostgreSQL, redis_url: str, tmp_path: Path
) -> None:
    url = own_postgres.create_database()
    migrations.upgrade(url)
    database = Database(url)
    world = World(database, database.run(reading.ensure_tenants, ["acme"])["acme"])
    living, dead = (world.claimed(world.submit().id, LEASE).claim for _ in range(2))
    with process(url, redis_url, tmp_path) as (runs, maintenance), runs.holding(living):
        runs.start()
        maintenance.start()
        own_postgres.stop()
        Event().wait(LEASE + 0.5)  # the outage
        own_postgres.start()
        until(lambda: living.job_id not in out_of_lease(world), 20, "a heartbeat")
        until(lambda: world.job(dead.job_id).crashes == 1, 20, "the rescue from the dead worker")
        job = world.job(living.job_id)
        assert (job.status, job.attempt, job.crashes) == (JobStatus.RUNNING, 1, 0)
    database.close()


@pytest.mark.parametrize("heartbeat", [0.001, 3600.0])
def test_a_process_that_starts_rescues_at_once_unless_the_database_has_started_as_well(
    database_url: str, heartbeat: float, redis_url: str, tmp_path: Path
) -> None:
    """Less than two of the longer heartbeats ago, that is: it has noticed no outage, but nobody
    could renew a lease before. SQLite has no server that starts."""
    migrations.upgrade(database_url)
    database = Database(database_url)
    world = World(database, database.run(reading.ensure_tenants, ["acme"])["acme"])
    job_id = world.claimed(world.submit().id, lease_seconds=-1.0).claim.job_id
    with process(database_url, redis_url, tmp_path, heartbeat) as (_, maintenance):
        maintenance.rescue_jobs()
    spared = heartbeat > 1 and database_url.startswith("postgresql")
    assert world.job(job_id).crashes == (0 if spared else 1)
    database.close()
