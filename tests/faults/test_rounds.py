"""A short version of ``make faults``: some rounds on each kind of system, with no violation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.load import Amounts
from tests.faults.rounds import Arena
from tests.faults.scenarios import SCENARIOS
from tests.faults.system import BrokerKind, DatabaseKind, System
from tests.servers import RabbitMQ

SHORT = Amounts(jobs=40, sessions=4, turns=4, batches=1, items=60, seconds=2.0)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

pytestmark = pytest.mark.timeout(400)


def arena(folder: Path, database: DatabaseKind, broker: BrokerKind) -> Iterator[Arena]:
    with Arena(System(folder / "system", database, broker)) as arena:
        yield arena


@pytest.fixture(scope="module")
def on_redis(servers_dir: Path) -> Iterator[Arena]:
    yield from arena(servers_dir / "on-redis", "postgresql", "redis")


@pytest.fixture(scope="module")
def on_rabbitmq(servers_dir: Path) -> Iterator[Arena]:
    if reason := RabbitMQ.missing():
        pytest.skip(reason)
    yield from arena(servers_dir / "on-rabbitmq", "postgresql", "rabbitmq")


@pytest.fixture(scope="module")
def on_sqlite(servers_dir: Path) -> Iterator[Arena]:
    yield from arena(servers_dir / "on-sqlite", "sqlite", "redis")


def check(arena: Arena, name: str) -> None:
    found = arena.round(BY_NAME[name], 1, SHORT)
    assert found.violations == [], found
    assert found.jobs == SHORT.total


@pytest.mark.parametrize(
    "name",
    [
        "a worker stands still past its lease",
        "kill -9 of workers at run.ended",
        "kill -9 of APIs at submit.accepted",
        "Redis killed, data lost",
        "messages dropped",
        "commits cut off",
        "no way to the database, past the lease",
        "poison for engines",
        "store fails",
    ],
)
def test_nothing_is_lost_doubled_or_out_of_order(on_redis: Arena, name: str) -> None:
    check(on_redis, name)


@pytest.mark.parametrize("name", ["RabbitMQ killed", "kill -9 of workers at events.published"])
def test_nothing_is_lost_doubled_or_out_of_order_with_rabbitmq(
    on_rabbitmq: Arena, name: str
) -> None:
    check(on_rabbitmq, name)


@pytest.mark.parametrize("name", ["kill -9 of everything", "SQLite's writer held"])
def test_nothing_is_lost_doubled_or_out_of_order_with_sqlite(on_sqlite: Arena, name: str) -> None:
    check(on_sqlite, name)
