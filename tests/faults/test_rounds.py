"""A short version of ``make faults``: some rounds on each kind of system, with no violation."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import clock
from tests.faults.load import Amounts
from tests.faults.rounds import Arena, plan
from tests.faults.scenarios import SCENARIOS, fitting_scenarios
from tests.faults.system import BrokerKind, DatabaseKind, System
from tests.servers import RabbitMQ

SHORT = Amounts(
    jobs=40, sessions=4, turns=4, deleted=1, batches=1, items=60, files=1, lines=40, seconds=2.0
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

pytestmark = pytest.mark.timeout(400)


def test_200_rounds_bring_each_scenario_to_each_system_that_it_fits() -> None:
    planned = plan(200, 1)
    assert sum(len(rounds) for rounds in planned.values()) == 200
    for system, rounds in planned.items():
        assert {scenario.name for scenario, _ in rounds} == {
            each.name for each in fitting_scenarios(*system)
        }
    seeds = [seed for rounds in planned.values() for _, seed in rounds]
    assert len(set(seeds)) == 200
    assert 200 * Amounts().total >= 105_000, "more than 100,000 jobs, with a margin"


@pytest.mark.parametrize(
    ("rounds", "system"), [(1, ""), (20, ""), (1, "sqlite,redis"), (300, "postgresql,rabbitmq")]
)
def test_as_many_rounds_are_planned_as_are_asked_for(rounds: int, system: str) -> None:
    planned = plan(rounds, 7, system=system)
    assert sum(len(each) for each in planned.values()) == rounds
    assert system in ("", *(",".join(kind) for kind in planned))


def test_a_clock_that_is_off_is_off_for_all_who_read_it() -> None:
    code = (
        "from tests.faults import clock; import time; from datetime import UTC, datetime;"
        "print(time.time(), time.time_ns() / 1e9, datetime.now(UTC).timestamp(),"
        "datetime.now().timestamp(), datetime.utcnow().replace(tzinfo=UTC).timestamp(),"
        "datetime.today().timestamp());"
        "assert isinstance(datetime.now(), datetime) and datetime(2020, 1, 1).year == 2020"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = os.environ | {clock.SETTING: "-300"}
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    times = [float(each) for each in told.stdout.split()]
    assert len(times) == 6
    assert all(250 < time.time() - each < 350 for each in times), times


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
    assert found.jobs >= SHORT.total
    assert found.struck > 0, found


@pytest.mark.parametrize(
    "name",
    [
        "a worker stands still past its lease",
        "kill -9 of workers at run.ended",
        "kill -9 of APIs at submit.accepted",
        "kill -9 of APIs at batch.chunk_added",
        "kill -9 of workers at batch.output_written",
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
