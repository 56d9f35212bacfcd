"""What goes wrong in a round. Each takes the system and seeded chance, and returns what it did."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
import redis
import sqlalchemy
from kombu import Connection, Producer, Queue

from tests.faults.played_engine import KILLS_ENGINE, KILLS_WORKER
from tests.faults.store import Refuse, Reset, Shorten, Silence, Slow, Truncate, WrongETag
from tests.faults.system import LEASE_SECONDS, BrokerKind, DatabaseKind, System
from visq.points import Point
from visq.types import Lane
from worker.queue.app import queue_name, transport_options

Run = Callable[[System, random.Random], str]


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

    def fits(self, system: System) -> bool:
        return self.database in (None, system.database) and self.broker in (None, system.broker)


# --- processes -------------------------------------------------------------------------------


def kill_workers(system: System, chance: random.Random) -> str:
    """kill -9 of a worker, and of another one a moment later."""
    victims = chance.sample(system.workers, 2)
    for worker in victims:
        worker.kill()
        system.wait(chance.uniform(0.1, 1.5))
    return f"killed {' and '.join(each.name for each in victims)}"


def kill_engines(system: System, chance: random.Random) -> str:
    struck = 0
    for worker in chance.sample(system.workers, 2):
        if (engine := worker.engine()) is not None:
            engine.kill()
            struck += 1
        system.wait(chance.uniform(0.2, 1.0))
    return f"killed {struck} engines"


def hang_an_engine(system: System, chance: random.Random) -> str:
    """SIGSTOP: the watchdog must find it."""
    worker = chance.choice(system.workers)
    engine = worker.engine()
    if engine is None:
        return "no engine to stop"
    engine.suspend()
    system.wait_for(lambda: not engine.is_running(), 20)
    return f"stopped the engine of {worker.name}"


def kill_apis(system: System, chance: random.Random) -> str:
    for api in chance.sample(system.apis, 2):
        api.kill()
        system.wait(chance.uniform(0.3, 1.5))
    return "killed both APIs, one after the other"


def kill_everything(system: System, chance: random.Random) -> str:
    for each in system.processes:
        each.kill()
    return "killed all processes at once"


def terminate_workers_in_turn(system: System, chance: random.Random) -> str:
    """A rolling restart with a grace that is too short for the long jobs."""
    for worker in system.workers:
        worker.terminate()
        system.wait_for(lambda worker=worker: not worker.alive, 20)
        system.wait(chance.uniform(0.5, 1.0))
    return "SIGTERM to one worker after the other"


def terminate_everything(system: System, chance: random.Random) -> str:
    for each in system.processes:
        each.terminate()
    system.wait_for(lambda: all(each.alive for each in system.processes), 30)
    return "SIGTERM to all processes at once"


def stop_a_worker_past_its_lease(system: System, chance: random.Random) -> str:
    """It comes back just before it writes its ends, when others have its jobs."""
    worker = chance.choice(system.workers)
    worker.arm("run.answered", chance.randint(1, 6), "stop")
    if not system.wait_for(lambda: worker.stopped, 5):
        worker.disarm()
        worker.stop()
    system.wait(LEASE_SECONDS + chance.uniform(0.4, 2.0))
    worker.go_on()
    return f"stopped {worker.name} for longer than its lease"


def at_point(point: Point, *kinds: str) -> Run:
    def kill_at_point(system: System, chance: random.Random) -> str:
        victims = [each for each in system.processes if each.kind in kinds]
        starts = {victim.name: victim.starts for victim in victims}
        for victim in victims:
            victim.arm(point, chance.randint(1, 5))

        def struck() -> int:
            return sum(victim.starts > starts[victim.name] for victim in victims)

        system.wait_for(lambda: struck() == len(victims), 4)
        for victim in victims:
            victim.disarm()
        return f"killed {struck()} of {len(victims)} at {point}"

    return kill_at_point


POINTS_OF_WORKERS: Final[tuple[Point, ...]] = (
    "transaction.committing",
    "transaction.committed",
    "run.taken",
    "run.claimed",
    "run.shown",
    "run.answered",
    "run.ended",
    "run.delivered",
    "events.in_redis",
    "events.published",
    "jobs.reserved",
    "jobs.published",
)
POINTS_OF_APIS: Final[tuple[Point, ...]] = (
    "submit.accepted",
    "submit.answering",
    "transaction.committing",
    "transaction.committed",
    "jobs.published",
)


def kill_after_a_rescue(system: System, chance: random.Random) -> str:
    """A worker dies; whoever takes its jobs dies before it has published what follows."""
    for each in system.processes:
        each.arm("jobs.rescued", 1)
    system.workers[0].kill()
    starts = sum(each.starts for each in system.processes)
    system.wait_for(lambda: sum(p.starts for p in system.processes) >= starts + 2, 8)
    return "killed whoever rescued the jobs of a killed worker"


# --- the broker and Redis --------------------------------------------------------------------


def kill_redis(system: System, chance: random.Random) -> str:
    system.valkey.kill()
    system.wait(chance.uniform(0.1, 2.0))
    system.valkey.restart(keep_data=True)
    return "killed Redis, which kept its data"


def lose_redis(system: System, chance: random.Random) -> str:
    system.valkey.kill()
    system.wait(chance.uniform(0.1, 1.0))
    system.valkey.restart(keep_data=False)
    system.redis_lost += 1
    return "killed Redis, which lost its data"


def flush_redis(system: System, chance: random.Random) -> str:
    with redis.Redis.from_url(system.redis_url) as client:
        client.flushall()
    system.redis_lost += 1
    return "FLUSHALL"


def kill_rabbitmq(system: System, chance: random.Random) -> str:
    assert system.rabbitmq is not None
    system.rabbitmq.kill()
    system.wait(chance.uniform(0.1, 1.0))
    system.rabbitmq.start()
    return "killed RabbitMQ"


Meddle = Callable[[list[Any], random.Random], list[Any]]


def _twice(messages: list[Any], chance: random.Random) -> list[Any]:
    return messages * 2


def _dropped(messages: list[Any], chance: random.Random) -> list[Any]:
    return []


def _shuffled(messages: list[Any], chance: random.Random) -> list[Any]:
    return chance.sample(messages, len(messages))


def with_messages(meddle: Meddle, what: str) -> Run:
    """Messages are taken out of the lanes, and come back (or not) in another way."""

    def run(system: System, chance: random.Random) -> str:
        count = 0
        deadline = time.monotonic() + 2.5
        options = transport_options(system.broker_url)
        with Connection(system.broker_url, transport_options=options) as connection:
            channel = connection.default_channel
            producer = Producer(channel)
            queues = [Queue(queue_name(lane), no_declare=True)(channel) for lane in Lane]
            while time.monotonic() < deadline:
                for queue in queues:
                    taken = _take(queue, 20)
                    for message in meddle(taken, chance):
                        producer.publish(
                            message.body,
                            content_type=message.content_type,
                            content_encoding=message.content_encoding,
                            headers=message.headers,
                            routing_key=queue.name,
                            exchange="",
                            **{
                                name: value
                                for name in ("correlation_id", "reply_to")
                                if (value := message.properties.get(name)) is not None
                            },
                        )
                    for message in taken:
                        message.ack()
                    count += len(taken)
                system.wait(0.02)
        return f"{count} messages {what}"

    return run


def _take(queue: Any, most: int) -> list[Any]:
    taken = []
    while len(taken) < most and (message := queue.get()) is not None:
        taken.append(message)
    return taken


# --- the database ----------------------------------------------------------------------------


def restart_postgres(system: System, chance: random.Random) -> str:
    assert system.postgres is not None
    system.postgres.restart()
    return "restarted PostgreSQL"


def kill_postgres(system: System, chance: random.Random) -> str:
    assert system.postgres is not None
    system.postgres.kill()
    system.wait(chance.uniform(0.1, 1.5))
    system.postgres.start()
    return "killed PostgreSQL"


@contextmanager
def _superuser(system: System) -> Iterator[psycopg.Connection[Any]]:
    url = system.database_url.replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


_TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


def terminate_connections(system: System, chance: random.Random) -> str:
    count = 0
    with _superuser(system) as connection:
        for _ in range(12):
            count += connection.execute(_TERMINATE).rowcount
            system.wait(chance.uniform(0.05, 0.3))
    return f"terminated {count} connections"


def serializable(system: System, chance: random.Random) -> str:
    """Transactions that meet each other are refused, instead of waiting."""
    with _superuser(system) as connection:
        name = connection.info.dbname
        for level in ("serializable", "read committed"):
            connection.execute(
                f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{level}'"
            )
            connection.execute(_TERMINATE)
            system.wait(3.0 if level == "serializable" else 0.0)
    return "3 s of serializable transactions"


def take_all_connections(system: System, chance: random.Random) -> str:
    url = system.database_url.replace("+psycopg", "")
    with ExitStack() as held:
        with _superuser(system) as connection:
            connection.execute(_TERMINATE)
        count = 0
        try:
            while True:
                held.enter_context(psycopg.connect(url))
                count += 1
        except psycopg.OperationalError:
            pass
        system.wait(chance.uniform(1.0, 3.0))
    return f"held {count} connections, all that the server has"


def lock_the_jobs(system: System, chance: random.Random) -> str:
    """Every transaction waits until the pools are exhausted."""
    with _superuser(system) as connection, connection.transaction():
        connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        system.wait(LEASE_SECONDS + chance.uniform(0.5, 2.0))
    return "locked the table of jobs for longer than a lease"


def lock_sqlite(system: System, chance: random.Random) -> str:
    engine = sqlalchemy.create_engine(system.database_url)
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        system.wait(chance.uniform(1.0, LEASE_SECONDS + 1.0))
        connection.exec_driver_sql("ROLLBACK")
    engine.dispose()
    return "held SQLite's writer"


def cut_commits(system: System, chance: random.Random) -> str:
    """The answer to a COMMIT does not come; half of them were made."""
    made = chance.random() < 0.5
    system.database_proxy.drop_after(b"COMMIT", passed_on=made, times=math.inf)
    system.wait(chance.uniform(1.0, 2.0))
    system.database_proxy.heal()
    return f"cut {system.database_proxy.struck} commits off, {'made' if made else 'not made'}"


# --- the network and the store ---------------------------------------------------------------


def partition(what: str, *, longer_than_lease: bool) -> Run:
    """Bytes stop flowing between the first worker (and API) and a server, and flow again later."""

    def run(system: System, chance: random.Random) -> str:
        proxy = getattr(system, f"{what}_proxy")
        seconds = chance.uniform(0.5, 1.5) + (LEASE_SECONDS if longer_than_lease else 0.0)
        proxy.stall()
        system.wait(seconds)
        proxy.heal()
        return f"no way to the {what} for {seconds:.1f} s"

    return run


def cut_off(what: str) -> Run:
    def run(system: System, chance: random.Random) -> str:
        proxy = getattr(system, f"{what}_proxy")
        proxy.cut()
        system.wait(chance.uniform(0.2, 2.0))
        proxy.heal()
        return f"connections to the {what} reset and refused"

    return run


def lie_about_pictures(system: System, chance: random.Random) -> str:
    lies = [Refuse(), Refuse(503, "SlowDown"), Truncate(), Shorten(), WrongETag(), Reset()]
    system.store.lie_at_random([*lies, Silence(), Slow()], share=0.3, seed=chance.getrandbits(32))
    system.wait(chance.uniform(1.5, 2.5))
    system.store.heal()
    return "a third of the store's answers were wrong"


# --- the rest --------------------------------------------------------------------------------


def clock_off(system: System, chance: random.Random) -> str:
    """Two workers whose clocks are five minutes off."""
    early, late, *_ = chance.sample(system.workers, 2)
    with (
        system.with_environment(early, FAULT_CLOCK="300"),
        system.with_environment(late, FAULT_CLOCK="-300"),
    ):
        system.wait(chance.uniform(1.5, 3.0))
    return f"{early.name} was 5 minutes ahead, {late.name} behind"


def fill_the_disk(system: System, chance: random.Random) -> str:
    """Of the data folders (the cache of images), and of SQLite."""
    if system.disk is None:
        return "nothing: this machine lets the tests mount no disk"
    system.disk.fill()
    system.wait(chance.uniform(1.0, LEASE_SECONDS + 1.0))
    system.disk.make_room()
    return "the disk was full"


def nothing(system: System, chance: random.Random) -> str:
    return "nothing"


def storm(system: System, chance: random.Random) -> str:
    """Several faults at the same time."""
    fitting = [s for s in SCENARIOS if s.fits(system) and not s.poison and s.run is not storm]
    done = []
    for scenario in chance.sample(fitting, 3):
        done.append(scenario.run(system, chance))
    return "; ".join(done)


SCENARIOS: Final[Sequence[Scenario]] = (
    Scenario("no fault", nothing),
    Scenario("kill -9 of workers", kill_workers),
    Scenario("kill -9 of engines", kill_engines),
    Scenario("an engine hangs", hang_an_engine),
    Scenario("kill -9 of the APIs", kill_apis),
    Scenario("kill -9 of everything", kill_everything),
    Scenario("SIGTERM of workers, short grace", terminate_workers_in_turn),
    Scenario("SIGTERM of everything", terminate_everything),
    Scenario("a worker stands still past its lease", stop_a_worker_past_its_lease),
    *(
        Scenario(f"kill -9 of workers at {point}", at_point(point, "worker"))
        for point in POINTS_OF_WORKERS
    ),
    *(Scenario(f"kill -9 of APIs at {point}", at_point(point, "api")) for point in POINTS_OF_APIS),
    Scenario("kill -9 after a rescue", kill_after_a_rescue),
    Scenario("Redis killed, data kept", kill_redis),
    Scenario("Redis killed, data lost", lose_redis),
    Scenario("Redis flushed", flush_redis),
    Scenario("RabbitMQ killed", kill_rabbitmq, broker="rabbitmq"),
    Scenario("messages delivered twice", with_messages(_twice, "came twice")),
    Scenario("messages dropped", with_messages(_dropped, "were dropped")),
    Scenario("messages reordered", with_messages(_shuffled, "came in another order")),
    Scenario("PostgreSQL restarted", restart_postgres, database="postgresql"),
    Scenario("PostgreSQL killed", kill_postgres, database="postgresql"),
    Scenario("connections terminated", terminate_connections, database="postgresql"),
    Scenario("commits cut off", cut_commits, database="postgresql"),
    Scenario("serialization failures", serializable, database="postgresql"),
    Scenario("all connections taken", take_all_connections, database="postgresql"),
    Scenario("table of jobs locked", lock_the_jobs, database="postgresql"),
    Scenario("SQLite's writer held", lock_sqlite, database="sqlite"),
    Scenario(
        "no way to the database, past the lease",
        partition("database", longer_than_lease=True),
        database="postgresql",
    ),
    Scenario("database cut off", cut_off("database"), database="postgresql"),
    Scenario("no way to Redis, past the lease", partition("redis", longer_than_lease=True)),
    Scenario("no way to the broker", partition("broker", longer_than_lease=False)),
    Scenario("broker cut off", cut_off("broker")),
    Scenario("store fails", lie_about_pictures),
    Scenario("disk full", fill_the_disk),
    Scenario("clocks 5 minutes off", clock_off),
    Scenario("poison for engines", nothing, poison=(KILLS_ENGINE,)),
    Scenario("poison for workers", nothing, poison=(KILLS_WORKER,)),
    Scenario("three faults at once", storm),
)
