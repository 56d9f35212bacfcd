"""The network between visq and its database: silent, cut, healed. Nobody waits for ever.

Whatever happens, a transaction ends in time, with its result or with `Unavailable`, and when the
fault is over the next one works.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from migrations.run import upgrade
from models import reading
from models.connections import MIGRATING, Limits
from models.database import AsyncDatabase, Database
from models.tables import Tenant
from tests.faults.proxy import Proxy, url_through
from tests.servers import PostgreSQL
from visq.errors import Unavailable

SHORT = Limits(pool=1.0, connect=2, statement=0.5, silence=1.0)
"""Limits that a test can wait for."""
PATIENT = Limits(pool=1.0, connect=2, statement=5.0, silence=5.0)

LONGEST = SHORT.pool + SHORT.silence + 2 * SHORT.connect
"""Seconds that a transaction may take with them, whatever happens."""


@pytest.fixture
def proxy(postgres: PostgreSQL) -> Iterator[Proxy]:
    with Proxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture
def url(postgres_url: str, proxy: Proxy) -> str:
    """An empty database behind `proxy`."""
    return url_through(postgres_url, proxy.port)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url, limits=SHORT)
    yield database
    database.close()


def one(session: Session) -> int | None:
    return session.scalar(text("SELECT 1"))


def backend(session: Session) -> int | None:
    return session.scalar(text("SELECT pg_backend_pid()"))


def test_a_server_that_falls_silent_is_an_outage_and_the_next_transaction_works_after_it(
    database: Database, proxy: Proxy
) -> None:
    def amid(session: Session) -> int | None:
        one(session)
        proxy.stall()
        return one(session)

    began = time.monotonic()
    with pytest.raises(Unavailable):
        database.run(amid)
    with pytest.raises(Unavailable):
        database.ping()  # now there is no connection, and none can be made
    assert time.monotonic() - began < 2 * LONGEST
    proxy.heal()
    assert database.run(one) == 1


def test_an_idle_connection_whose_server_is_silent_is_replaced(
    database: Database, proxy: Proxy
) -> None:
    first = database.run(backend)
    proxy.stall()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(database.run, backend)
        # It has given its old connection up, and makes a new one.
        time.sleep(SHORT.silence + 0.5)
        proxy.heal()
        assert waiting.result(LONGEST) != first


def test_a_short_silence_harms_nothing(url: str, proxy: Proxy) -> None:
    database = Database(url, limits=PATIENT)
    first = database.run(backend)
    proxy.stall()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(database.run, backend)
        time.sleep(1.0)
        proxy.heal()
        assert waiting.result(LONGEST) == first
    database.close()


async def test_the_event_loop_gives_up_a_silent_server_as_well(url: str, proxy: Proxy) -> None:
    database = AsyncDatabase(url, limits=SHORT)
    assert await database.run(one) == 1
    proxy.stall()
    async with asyncio.timeout(2 * LONGEST):
        answers = await asyncio.gather(
            *(database.run(one) for _ in range(30)), return_exceptions=True
        )
        assert {type(answer) for answer in answers} == {Unavailable}
        proxy.heal()
        assert await asyncio.gather(*(database.run(one) for _ in range(30))) == [1] * 30
    await database.close()


async def test_a_request_that_is_cancelled_while_the_server_is_silent_ends(
    url: str, proxy: Proxy
) -> None:
    database = AsyncDatabase(url, limits=SHORT)
    assert await database.run(one) == 1
    proxy.stall()
    async with asyncio.timeout(2 * LONGEST):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(database.run(one), 0.2)
    proxy.heal()
    assert await database.run(one) == 1
    await database.close()


@pytest.mark.parametrize("healed_at_once", [True, False])
def test_after_a_cut_the_first_transaction_works(
    database: Database, proxy: Proxy, healed_at_once: bool
) -> None:
    barrier = threading.Barrier(8)

    def hold(session: Session) -> None:
        one(session)
        barrier.wait(10)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: database.run(hold), range(8)))  # eight connections lie in the pool
        proxy.cut()
        if not healed_at_once:
            with pytest.raises(Unavailable):
                database.run(one)
        proxy.heal()
        assert list(pool.map(lambda _: database.run(one), range(8))) == [1] * 8


def test_a_transaction_that_is_cut_in_the_middle_leaves_nothing(
    database: Database, proxy: Proxy, postgres_url: str
) -> None:
    upgrade(postgres_url)

    def amid(session: Session) -> None:
        reading.ensure_tenants(session, ["half"])
        proxy.cut()
        reading.ensure_tenants(session, ["other half"])

    with pytest.raises(Unavailable):
        database.run(amid)
    proxy.heal()
    assert database.read(lambda session: session.scalars(select(Tenant.name)).all()) == []


def test_locks_of_a_client_that_vanished_are_free_in_time(
    database: Database, proxy: Proxy, postgres_url: str
) -> None:
    """Or nobody could rescue the job that its transaction had."""
    upgrade(postgres_url)
    other = Database(postgres_url, limits=PATIENT)
    other.run(reading.ensure_tenants, ["held"])

    rename = update(Tenant).where(Tenant.name == "held").values(name="held")

    def vanish(session: Session) -> None:
        session.execute(rename)
        proxy.stall()
        session.execute(rename)

    with pytest.raises(Unavailable):
        database.run(vanish)
    other.run(lambda session: session.execute(rename))
    other.close()


def test_waiting_for_a_lock_ends(postgres_url: str) -> None:
    upgrade(postgres_url)
    database = Database(postgres_url, limits=SHORT)
    database.run(reading.ensure_tenants, ["held"])
    lock = select(Tenant).where(Tenant.name == "held").with_for_update()

    def hold_while_another_waits(session: Session) -> None:
        session.scalars(lock).one()
        with pytest.raises(Unavailable, match="busy"):
            database.run(lambda session: session.scalars(lock).one())

    database.run(hold_while_another_waits)
    database.close()


def test_the_urls_own_parameters_go_before(postgres_url: str) -> None:
    database = Database(f"{postgres_url}?options=-c%20statement_timeout%3D1234&connect_timeout=3")
    shown = database.read(lambda session: session.scalar(text("SHOW statement_timeout")))
    assert shown == "1234ms"
    database.close()


def test_a_migration_has_no_limits(postgres_url: str) -> None:
    database = Database(postgres_url, limits=MIGRATING)
    shown = database.read(
        lambda session: session.execute(
            text(
                "SELECT current_setting('statement_timeout'),"
                " current_setting('idle_in_transaction_session_timeout')"
            )
        ).one()
    )
    assert tuple(shown) == ("0", "0")
    database.close()
