"""The database under faults and under load: connections ended, the server killed, commits that
nobody answers, transactions that it undoes. Nothing is lost, nothing doubled.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text

from migrations.run import upgrade
from models import reading, submit
from models.connections import Limits
from models.database import AsyncDatabase, Database
from tests.faults.database_load import Load
from tests.faults.proxy import Direction, Proxy, url_through
from tests.servers import PostgreSQL
from tests.waiting import until
from visq.errors import Unavailable
from visq.types import JobRequest

PATIENT = Limits(pool=1.0, connect=2, statement=5.0, silence=5.0)
"""A test can wait for them, and a busy machine does not reach them."""


@pytest.fixture
def proxy(postgres: PostgreSQL) -> Iterator[Proxy]:
    with Proxy(postgres.port) as proxy:
        yield proxy


class Assassin:
    """Ends connections to the database of `url`, as an administrator may."""

    def __init__(self, url: str, seed: int) -> None:
        address, _, self._name = url.replace("+psycopg", "").rpartition("/")
        self._administrator = psycopg.connect(f"{address}/postgres", autocommit=True)
        self._chance = random.Random(seed)
        self.struck = 0

    def strike(self) -> None:
        rows = self._administrator.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = %s", [self._name]
        ).fetchall()
        if rows:
            self._administrator.execute(
                "SELECT pg_terminate_backend(%s)", self._chance.choice(rows)
            )
            self.struck += 1

    def close(self) -> None:
        self._administrator.close()


@pytest.fixture
def assassin(postgres_url: str) -> Iterator[Assassin]:
    assassin = Assassin(postgres_url, seed=1)
    yield assassin
    assassin.close()


def test_connections_that_are_ended_under_load_lose_and_double_nothing(
    postgres_url: str, assassin: Assassin
) -> None:
    upgrade(postgres_url)
    database = Database(postgres_url, limits=PATIENT)
    load = Load(database, seed=1)
    with load.running():
        until(lambda: len(load.accepted) > 20, 20, "some jobs")
        while assassin.struck < 60:
            assassin.strike()
            time.sleep(0.03)
    assert load.outages > 10
    load.settle()
    database.close()


async def test_the_event_loop_outlives_connections_that_end_and_requests_that_are_cancelled(
    postgres_url: str, assassin: Assassin
) -> None:
    upgrade(postgres_url)
    database = AsyncDatabase(postgres_url, pool_size=3, limits=PATIENT)
    tenant = (await database.run(reading.ensure_tenants, ["acme"]))["acme"]
    mine = database.for_tenant(tenant)
    request = JobRequest(prompt="once")
    ended: Counter[str] = Counter()

    async def client(number: int, patience: float) -> None:
        while assassin.struck < 40:
            key = f"{number}-{ended.total()}"
            try:
                async with asyncio.timeout(patience):
                    await mine.run(
                        submit.submit_job, tenant, request, max_attempts=3, idempotency_key=key
                    )
                ended["accepted"] += 1
            except Unavailable:
                ended["unavailable"] += 1
            except TimeoutError:
                ended["cancelled"] += 1

    async def strike() -> None:
        while assassin.struck < 40:
            assassin.strike()
            await asyncio.sleep(0.03)

    async with asyncio.TaskGroup() as group:
        group.create_task(strike())
        for number in range(12):
            group.create_task(client(number, 0.02 if number % 3 == 0 else 30.0))
    assert min(ended["accepted"], ended["unavailable"], ended["cancelled"]) > 5, ended
    assert await asyncio.gather(*(database.ping() for _ in range(12))) == [None] * 12
    assert database.engine.pool.checkedout() == 0
    await database.close()


def test_a_server_that_is_killed_and_restarted_under_load_loses_and_doubles_nothing(
    servers_dir: Path,
) -> None:
    with PostgreSQL(servers_dir / "restarted-postgres") as own:
        url = own.create_database()
        upgrade(url)
        database = Database(url, limits=PATIENT)
        load = Load(database, seed=2)
        with load.running():
            for end in (own.kill, own.stop):
                there = len(load.accepted)
                until(lambda there=there: len(load.accepted) > there + 20, 20, "more jobs")  # type: ignore[misc]
                end()
                until(lambda: load.outages > 10, 20, "outages")
                own.start()
        load.settle()
        database.close()


@pytest.mark.parametrize(
    ("direction", "passed_on"),
    [("to_server", True), ("to_server", False), ("to_client", False)],
    ids=["perhaps committed", "not committed", "committed"],
)
def test_commits_that_nobody_answers_lose_and_double_nothing(
    postgres_url: str, proxy: Proxy, direction: Direction, passed_on: bool
) -> None:
    """Submit, claim, finish, rescue, outbox: whatever is being committed."""
    upgrade(postgres_url)
    database = Database(url_through(postgres_url, proxy.port), limits=PATIENT)
    load = Load(database, seed=3)
    with load.running():
        for _ in range(30):
            before = proxy.struck
            proxy.drop_after(b"COMMIT", direction, passed_on=passed_on)
            until(lambda before=before: proxy.struck > before, 10, "a commit", every=0.005)  # type: ignore[misc]
            time.sleep(0.03)
        proxy.heal()
    assert load.outages >= 30
    load.settle()
    database.close()


def test_serializable_transactions_are_repeated_until_they_fit(postgres_url: str) -> None:
    """A database may be set up so: then the database undoes what it cannot order."""
    upgrade(postgres_url)
    database = Database(postgres_url, limits=PATIENT)
    name = database.engine.url.database
    database.run(
        lambda session: session.execute(
            text(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
        )
    )
    database.close()
    load = Load(database, seed=4, clients=3, workers=4)
    with load.running():
        until(lambda: len(load.accepted) > 150, 60, "many jobs")
    rolled_back = database.read(
        lambda session: session.scalar(
            text("SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()")
        )
    )
    assert rolled_back > 20
    assert load.outages < rolled_back / 4
    load.settle()
    database.close()


def test_a_key_that_comes_at_once_from_many_makes_one_job_of_serializable_transactions(
    postgres_url: str,
) -> None:
    upgrade(postgres_url)
    database = Database(f"{postgres_url}?options=-c%20default_transaction_isolation%3Dserializable")
    tenant = database.run(reading.ensure_tenants, ["acme"])["acme"]
    request = JobRequest(prompt="once")

    def submit_it(key: str) -> str:
        return database.run(
            submit.submit_job, tenant, request, max_attempts=3, idempotency_key=key
        ).job.id

    with ThreadPoolExecutor(8) as pool:
        for key in "abcdefgh":
            assert len(set(pool.map(submit_it, [key] * 8))) == 1
    database.close()


def test_a_server_that_takes_no_writes_is_an_outage(postgres_url: str) -> None:
    """After a failover the old primary is a standby."""
    upgrade(postgres_url)
    standby = Database(f"{postgres_url}?options=-c%20default_transaction_read_only%3Don")
    with pytest.raises(Unavailable, match="cannot do this"):
        standby.run(reading.ensure_tenants, ["acme"])
    standby.ping()
    standby.close()
