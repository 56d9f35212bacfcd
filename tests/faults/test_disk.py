"""An SQLite database whose disk is full: nothing is half-written, and with room it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import event, select

from migrations.run import upgrade
from models import jobs, reading, submit
from models.database import AsyncDatabase, Database
from models.tables import Job
from tests.deployment import API_KEY, Deployment
from tests.faults.database_load import Load
from tests.faults.disk import SmallDisk
from tests.waiting import until
from visq.errors import Unavailable
from visq.types import JobRequest
from visq.types import JobStatus as S

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = SmallDisk.mounted(folder, 16 * MIB)
    if disk is None:
        pytest.skip("this machine lets the tests mount nothing")
    yield disk
    disk.remove()


class Room:
    """SQLite's own limit of a database's size, which it treats as a full disk."""

    def __init__(self, engine: Any) -> None:
        self.pages = 1 << 30
        event.listen(engine, "checkout", self._limit)

    def _limit(self, connection: Any, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA max_page_count={self.pages}")
        cursor.close()


def pages(database: Database) -> int:
    with database.engine.connect() as connection:
        return int(connection.exec_driver_sql("PRAGMA page_count").scalar_one())


def submit_one(database: Database, tenant: str, **fields: Any) -> str:
    request = JobRequest.model_validate({"prompt": "x" * 20_000} | fields)
    return database.run(submit.submit_job, tenant, request, max_attempts=3).job.id


FULL = "disk of the database is full"


def test_on_a_full_disk_nothing_is_half_written_and_it_goes_on_with_room(sqlite_url: str) -> None:
    upgrade(sqlite_url)
    database = Database(sqlite_url)
    tenant = database.run(reading.ensure_tenants, ["acme"])["acme"]
    room = Room(database.engine)
    room.pages = pages(database) + 100
    accepted = []
    with pytest.raises(Unavailable, match=FULL):  # noqa: PT012 (some are accepted before)
        for _ in range(100):
            accepted.append(submit_one(database, tenant))
    assert accepted
    ids = database.read(lambda session: session.scalars(select(Job.id)).all())
    assert set(ids) == set(accepted)
    room.pages = 1 << 30
    accepted.append(submit_one(database, tenant))
    assert database.run(jobs.claim, accepted[0], worker="w", lease_seconds=30) is not None
    database.close()


async def test_in_the_event_loop_as_well(sqlite_url: str) -> None:
    upgrade(sqlite_url)
    database = AsyncDatabase(sqlite_url)
    tenant = (await database.run(reading.ensure_tenants, ["acme"]))["acme"]
    room = Room(database.engine.sync_engine)
    room.pages = 1
    request = JobRequest(prompt="x" * 200_000)
    with pytest.raises(Unavailable, match=FULL):
        await database.run(submit.submit_job, tenant, request, max_attempts=3)
    room.pages = 1 << 30
    await database.run(submit.submit_job, tenant, request, max_attempts=3)
    await database.close()


def test_a_disk_that_fills_up_under_load_loses_and_doubles_nothing(disk: SmallDisk) -> None:
    url = f"sqlite:///{disk.folder / 'visq.db'}"
    upgrade(url)
    database = Database(url)
    load = Load(database, seed=5)
    with load.running():
        for _ in range(3):
            there = len(load.accepted)
            until(lambda there=there: len(load.accepted) > there + 20, 30, "more jobs")  # type: ignore[misc]
            disk.fill()
            outages = load.outages
            until(lambda outages=outages: load.outages > outages + 10, 30, "outages")  # type: ignore[misc]
            assert database.read(reading.list_jobs, limit=10)  # what is there can be read
            disk.make_room()
    load.settle()
    database.close()


@pytest.mark.timeout(300)
def test_a_deployment_on_a_full_disk_refuses_jobs_and_ends_the_running_ones_later(
    disk: SmallDisk, tmp_path: Path, redis_url: str
) -> None:
    settings = {
        "database_url": f"sqlite:///{disk.folder / 'visq.db'}",
        "redis_url": redis_url,
        "broker_url": redis_url,
    }
    long = {"max_new_tokens": 60, "ignore_eos": True}
    with Deployment(tmp_path / "visq", settings) as deployment, deployment.client() as client:
        worker = deployment.start_worker()
        running = [client.jobs.submit(prompt="go on", gen_config=long) for _ in range(2)]
        queued = [client.jobs.submit(prompt="go on", gen_config=long)]
        until(lambda: running[0].refresh().status is S.RUNNING, 30, "a running job")
        disk.fill()
        refused = httpx2.post(
            f"{deployment.url}/v1/jobs",
            json={"prompt": "x"},
            headers={"Authorization": f"Bearer {API_KEY}"},
            timeout=30,
            trust_env=False,
        )
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "unavailable"
        assert refused.headers["retry-after"]
        until(lambda: b"end not written yet" in worker.log.read_bytes(), 60, "an end that waits")
        assert all(not job.refresh().status.is_terminal for job in running)
        disk.make_room()
        for job in [*running, *queued]:
            assert job.wait(120).status is S.SUCCEEDED
            assert sum(event.to_status.is_terminal for event in job.history()) == 1
        assert worker.alive
        for log in (worker.log, deployment.folder / "api.log"):
            assert b"Traceback" not in log.read_bytes()


def test_a_disk_that_has_become_read_only_is_an_outage(disk: SmallDisk) -> None:
    url = f"sqlite:///{disk.folder / 'visq.db'}"
    upgrade(url)
    database = Database(url)
    tenant = database.run(reading.ensure_tenants, ["acme"])["acme"]
    database.close()
    disk.mount("remount,ro")
    with pytest.raises(Unavailable, match=r"cannot be (written|opened)"):
        submit_one(database, tenant)
    disk.mount("remount,rw")
    submit_one(database, tenant)
    database.close()


def test_a_file_that_cannot_be_opened_is_an_outage(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'nowhere' / 'visq.db'}")
    with pytest.raises(Unavailable, match="cannot be opened"):
        database.ping()
    database.close()
