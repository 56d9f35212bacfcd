"""What goes wrong in a round: each scenario breaks something, by seeded chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.faults import breaking_processes as processes
from tests.faults import breaking_servers as servers
from tests.faults.breaking_processes import AT_POINTS, Run
from tests.faults.played_engine import KILLS_ENGINE, KILLS_WORKER
from tests.faults.system import BrokerKind, DatabaseKind, System


@dataclass(frozen=True)
class Scenario:
    """A kind of fault."""

    name: str
    run: Run
    poison: tuple[str, ...] = ()
    """Of jobs among the round's."""
    database: DatabaseKind | None = None
    broker: BrokerKind | None = None
    """Where it can happen; ``None``: everywhere."""

    def fits(self, database: DatabaseKind, broker: BrokerKind) -> bool:
        return self.database in (None, database) and self.broker in (None, broker)


def nothing(system: System, chance: random.Random) -> tuple[int, str]:
    """What goes wrong, if anything, is in the jobs: the checker sees whether it did."""
    return 1, "nothing"


def storm(system: System, chance: random.Random) -> tuple[int, str]:
    """Several faults at the same time."""
    fitting = [
        s
        for s in fitting_scenarios(system.database, system.broker)
        if s.run not in (nothing, storm)
    ]
    done = [scenario.run(system, chance) for scenario in chance.sample(fitting, 3)]
    return min(struck for struck, _ in done), "; ".join(words for _, words in done)


def fitting_scenarios(database: DatabaseKind, broker: BrokerKind) -> list[Scenario]:
    """Those that can happen on such a system."""
    return [each for each in SCENARIOS if each.fits(database, broker)]


SCENARIOS: Final[Sequence[Scenario]] = (
    Scenario("no fault", nothing),
    Scenario("kill -9 of workers", processes.kill_workers),
    Scenario("kill -9 of engines", processes.kill_engines),
    Scenario("an engine hangs", processes.hang_an_engine),
    Scenario("kill -9 of the APIs", processes.kill_apis),
    Scenario("kill -9 of everything", processes.kill_everything),
    Scenario("SIGTERM of workers, short grace", processes.terminate_workers_in_turn),
    Scenario("SIGTERM of everything", processes.terminate_everything),
    Scenario("a worker stands still past its lease", processes.stop_a_worker_past_its_lease),
    *(Scenario(name, run) for name, run in AT_POINTS.items()),
    Scenario("Redis killed, data kept", servers.kill_redis),
    Scenario("Redis killed, data lost", servers.lose_redis),
    Scenario("Redis flushed", servers.flush_redis),
    Scenario("RabbitMQ killed", servers.kill_rabbitmq, broker="rabbitmq"),
    Scenario("messages delivered twice", servers.with_messages(servers.twice, "came twice")),
    Scenario("messages dropped", servers.with_messages(servers.dropped, "were dropped")),
    Scenario(
        "messages reordered", servers.with_messages(servers.shuffled, "came in another order")
    ),
    Scenario("PostgreSQL restarted", servers.restart_postgres, database="postgresql"),
    Scenario("PostgreSQL killed", servers.kill_postgres, database="postgresql"),
    Scenario("connections terminated", servers.terminate_connections, database="postgresql"),
    Scenario("commits cut off", servers.cut_commits, database="postgresql"),
    Scenario("serialization failures", servers.serializable, database="postgresql"),
    Scenario("all connections taken", servers.take_all_connections, database="postgresql"),
    Scenario("table of jobs locked", servers.lock_the_jobs, database="postgresql"),
    Scenario("SQLite's writer held", servers.lock_sqlite, database="sqlite"),
    Scenario(
        "no way to the database, past the lease",
        servers.partition("database", longer_than_lease=True),
        database="postgresql",
    ),
    Scenario("database cut off", servers.cut_off("database"), database="postgresql"),
    Scenario("no way to Redis, past the lease", servers.partition("redis", longer_than_lease=True)),
    Scenario("no way to the broker", servers.partition("broker", longer_than_lease=False)),
    Scenario("broker cut off", servers.cut_off("broker")),
    Scenario("store fails", servers.lie_about_pictures),
    Scenario("pictures replaced", servers.replace_pictures),
    Scenario("pictures deleted", servers.delete_pictures),
    Scenario("disk full", servers.fill_the_disk),
    Scenario("clocks 5 minutes off", servers.clock_off),
    Scenario("poison for engines", nothing, poison=(KILLS_ENGINE,)),
    Scenario("poison for workers", nothing, poison=(KILLS_WORKER,)),
    Scenario("three faults at once", storm),
)
