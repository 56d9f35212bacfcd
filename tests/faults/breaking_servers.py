"""Faults of servers, of the network between, of the disk and of clocks."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import redis
import sqlalchemy
from kombu import Connection, Producer, Queue

from tests.faults.breaking_processes import Run
from tests.faults.store import Refuse, Reset, Shorten, Silence, Slow, Truncate, WrongETag
from tests.faults.system import LEASE_SECONDS, System
from visq.types import Lane
from worker.queue.app import queue_name, transport_options

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


def twice(messages: list[Any], chance: random.Random) -> list[Any]:
    return messages * 2


def dropped(messages: list[Any], chance: random.Random) -> list[Any]:
    return []


def shuffled(messages: list[Any], chance: random.Random) -> list[Any]:
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
