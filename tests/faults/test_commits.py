"""A connection to the database breaks while it commits: nobody knows whether the commit was made.

Each of the transactions that a job lives by, with a commit that was made and one that was not. What
such faults leave behind under load: `test_database`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, text

from migrations.run import upgrade
from models import jobs, reading, sessions
from models.database import Database
from models.tables import Outbox
from tests.api.conftest import settings_for
from tests.api.running import RunningApi
from tests.faults.proxy import Proxy, url_through
from tests.faults.test_restarts import Results
from tests.servers import PostgreSQL
from tests.waiting import until
from tests.worker.playing import World, played_worker
from visq.errors import Unavailable
from visq.settings import Settings
from visq.types import JobStatus as S

Drop = Callable[[bytes], None]
"""Drop the answer to the next commit of a transaction with these bytes in it."""


@pytest.fixture
def proxy(postgres: PostgreSQL) -> Iterator[Proxy]:
    with Proxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture(params=[True, False], ids=["committed", "not committed"])
def committed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def drop(proxy: Proxy, committed: bool) -> Drop:
    def drop(after: bytes) -> None:
        # Not passed on either way: the question is whether the commit is held, or its answer.
        direction = "to_client" if committed else "to_server"
        proxy.drop_after(b"COMMIT", direction, passed_on=False, after=after)

    return drop


@dataclass
class Worker(World):
    """A worker behind the proxy; `seen` is the database itself."""

    seen: Database

    def count(self, what: Any) -> int:
        return self.seen.read(
            lambda session: session.scalar(select(func.count()).select_from(what))
        )

    def pass_time(self) -> None:
        """All that waits for a time waits no longer."""
        later = "now() - interval '1 second'"

        def move(session: Any) -> None:
            session.execute(text(f"UPDATE outbox SET available_at = {later}"))
            session.execute(
                text(
                    f"UPDATE jobs SET lease_expires_at = {later} WHERE lease_expires_at IS NOT NULL"
                )
            )
            session.execute(
                text(f"UPDATE jobs SET run_after = {later} WHERE run_after IS NOT NULL")
            )

        self.seen.run(move)

    def path(self, job_id: str) -> list[str]:
        return [event.to_status for event in self.seen.read(reading.job_events, job_id)]


@pytest.fixture
def worker(postgres_url: str, proxy: Proxy, redis_url: str, tmp_path: Path) -> Iterator[Worker]:
    upgrade(postgres_url)
    url = url_through(postgres_url, proxy.port)
    settings = Settings(
        data=tmp_path,
        database_url=url,
        broker_url=redis_url,
        redis_url=redis_url,
        heartbeat_seconds=0.001,  # nothing is rescued for two of them after an outage
    )
    seen = Database(postgres_url)
    with played_worker(settings) as world:
        yield Worker(**vars(world), seen=seen)
    seen.close()


def test_a_submit_is_made_once_if_the_client_repeats_it_with_its_key(
    postgres_url: str, proxy: Proxy, drop: Drop, redis_url: str, tmp_path: Path, committed: bool
) -> None:
    upgrade(postgres_url)
    settings = settings_for(url_through(postgres_url, proxy.port), redis_url, tmp_path)
    with RunningApi(settings) as api, api.client("secret-0") as client:

        def submit() -> Any:
            return client.post(
                "/v1/jobs", json={"prompt": "once"}, headers={"Idempotency-Key": "the-first"}
            )

        drop(b"INSERT INTO jobs")
        refused = submit()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "unavailable"
        assert refused.headers["retry-after"]
        assert proxy.struck == 1
        accepted = submit()
        assert accepted.is_success
        assert submit().json()["id"] == accepted.json()["id"]
        assert [job["id"] for job in client.get("/v1/jobs").json()["data"]] == [
            accepted.json()["id"]
        ]
        # Who made it in the first commit never learned of it, and has not published it.
        database = Database(postgres_url)
        until(
            lambda: database.read(jobs.get, accepted.json()["id"]).publishes,
            20,
            "the message to the workers",
        )
        database.close()


def test_a_claim_that_nobody_knows_of_runs_out(worker: Worker, drop: Drop, committed: bool) -> None:
    job_id = worker.submit()
    drop(b"running")
    worker.executor.run(job_id)
    assert worker.engine.requests == []
    assert worker.path(job_id) == ["queued", "running"] if committed else ["queued"]
    worker.pass_time()
    worker.maintenance.rescue_jobs()
    worker.pass_time()
    worker.executor.run(job_id)
    job = worker.job(job_id)
    assert (job.status, job.attempt) == (S.SUCCEEDED, 2 if committed else 1)
    assert job.failures == 0
    assert worker.path(job_id).count("succeeded") == 1


def test_an_end_is_written_once_and_its_event_is_published(
    worker: Worker, drop: Drop, committed: bool, redis_url: str
) -> None:
    results = Results(redis_url)
    session = worker.seen.run(sessions.open_session, worker.tenant_id, {})
    first, second = (worker.submit(session_id=session.id) for _ in range(2))
    drop(b"succeeded")
    worker.executor.run(first)
    assert worker.path(first) == ["queued", "running", "succeeded"]
    assert len(worker.engine.requests) == 1
    # Who made the end does not know of it: then the maintenance loop publishes what follows.
    assert worker.count(Outbox) == (1 if committed else 0)
    assert worker.job(second).status is S.QUEUED
    worker.pass_time()
    worker.maintenance.publish_events()
    assert worker.count(Outbox) == 0
    assert [event.job.id for event in results.take_all()] == [first]
    worker.executor.run(second)
    assert [len(request.messages) for request in worker.engine.requests] == [1, 3]


def test_events_that_may_have_been_struck_off_come_again_with_the_same_id(
    worker: Worker, drop: Drop, committed: bool, redis_url: str
) -> None:
    results = Results(redis_url)
    job_id = worker.submit()
    drop(b"DELETE FROM outbox")
    worker.executor.run(job_id)
    assert worker.job(job_id).status is S.SUCCEEDED
    assert worker.count(Outbox) == (0 if committed else 1)
    worker.pass_time()
    worker.maintenance.publish_events()
    assert worker.count(Outbox) == 0
    ids = [event.id for event in results.take_all()]
    assert len(ids) == (1 if committed else 2)
    assert len(set(ids)) == 1


def test_a_rescue_is_made_once(worker: Worker, drop: Drop, committed: bool) -> None:
    job_id = worker.submit()
    worker.seen.run(jobs.claim, job_id, worker="dead", lease_seconds=30)
    worker.pass_time()
    drop(b"the lease of dead ran out")
    for _ in range(3):
        worker.maintenance.round()
    assert worker.path(job_id) == ["queued", "running", "queued"]
    assert worker.job(job_id).crashes == 1
    worker.pass_time()
    worker.executor.run(job_id)
    assert worker.job(job_id).status is S.SUCCEEDED


def test_a_cancel_is_made_once(worker: Worker, drop: Drop) -> None:
    job_id = worker.submit()
    drop(b"cancelled")
    with pytest.raises(Unavailable):
        worker.database.run(jobs.cancel, job_id)
    worker.database.run(jobs.cancel, job_id)
    assert worker.path(job_id) == ["queued", "cancelled"]
    assert worker.count(Outbox) == 1
