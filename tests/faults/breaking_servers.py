"""Faults of servers, of the network between, of pictures, of the disk and of clocks."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
import redis
import sqlalchemy
from kombu import Connection, Producer, Queue
from sqlalchemy import func, or_, select

from models.tables import Job
from tests.faults import clock
from tests.faults.breaking_processes import Run, standing_still
from tests.faults.store import Refuse, Reset, Shorten, Silence, Slow, Truncate, WrongETag
from tests.faults.system import LEASE_SECONDS, System
from visq.errors import ImageNotFound
from visq.types import Lane
from worker.queue.app import queue_name, transport_options

ENOUGH_MESSAGES: Final = 30
"""To meddle with in one round."""

# --- the broker and Redis --------------------------------------------------------------------


def kill_redis(system: System, chance: random.Random) -> tuple[int, str]:
    system.valkey.kill()
    system.wait(chance.uniform(0.1, 2.0))
    system.valkey.restart(keep_data=True)
    return 1, "killed Redis, which kept its data"


def lose_redis(system: System, chance: random.Random) -> tuple[int, str]:
    system.valkey.kill()
    system.note_loss_of_redis()
    system.wait(chance.uniform(0.1, 1.0))
    system.valkey.restart(keep_data=False)
    return 1, "killed Redis, which lost its data"


def flush_redis(system: System, chance: random.Random) -> tuple[int, str]:
    with redis.Redis.from_url(system.redis_url) as client:
        client.flushall()
    system.note_loss_of_redis()
    return 1, "FLUSHALL"


def kill_rabbitmq(system: System, chance: random.Random) -> tuple[int, str]:
    assert system.rabbitmq is not None
    system.rabbitmq.kill()
    system.wait(chance.uniform(0.1, 1.0))
    system.rabbitmq.start()
    return 1, "killed RabbitMQ"


Meddle = Callable[[list[Any], random.Random], list[Any]]


def twice(messages: list[Any], chance: random.Random) -> list[Any]:
    return messages * 2


def dropped(messages: list[Any], chance: random.Random) -> list[Any]:
    return []


def shuffled(messages: list[Any], chance: random.Random) -> list[Any]:
    return chance.sample(messages, len(messages))


def with_messages(meddle: Meddle, what: str) -> Run:
    """Messages are taken out of the lanes, and come back (or not) in another way.

    The workers stand still for moments, much shorter than a lease, so that messages pile up.
    """

    def run(system: System, chance: random.Random) -> tuple[int, str]:
        count = 0
        deadline = time.monotonic() + 8.0
        options = transport_options(system.broker_url)
        with Connection(system.broker_url, transport_options=options) as connection:
            channel = connection.default_channel
            producer = Producer(channel)
            queues = [Queue(queue_name(lane), no_declare=True)(channel) for lane in Lane]
            while count < ENOUGH_MESSAGES and time.monotonic() < deadline:
                with standing_still(system.workers):
                    system.wait(LEASE_SECONDS / 3)
                    taken = {queue.name: _take(queue, 20) for queue in queues}
                    for name, messages in taken.items():
                        for message in meddle(messages, chance):
                            _put_back(producer, name, message)
                        for message in messages:
                            message.ack()
                        count += len(messages)
                system.wait(0.3)
        return count, f"{count} messages {what}"

    return run


def _put_back(producer: Producer, queue: str, message: Any) -> None:
    kept = {name: message.properties.get(name) for name in ("correlation_id", "reply_to")}
    producer.publish(
        message.body,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=message.headers,
        routing_key=queue,
        exchange="",
        **{name: value for name, value in kept.items() if value is not None},
    )


def _take(queue: Any, most: int) -> list[Any]:
    taken = []
    while len(taken) < most and (message := queue.get()) is not None:
        taken.append(message)
    return taken


# --- the database ----------------------------------------------------------------------------


def restart_postgres(system: System, chance: random.Random) -> tuple[int, str]:
    assert system.postgres is not None
    system.postgres.restart()
    return 1, "restarted PostgreSQL"


def kill_postgres(system: System, chance: random.Random) -> tuple[int, str]:
    assert system.postgres is not None
    system.postgres.kill()
    system.wait(chance.uniform(0.1, 1.5))
    system.postgres.start()
    return 1, "killed PostgreSQL"


@contextmanager
def _superuser(system: System) -> Iterator[psycopg.Connection[Any]]:
    url = system.database_url.replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


_TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


def terminate_connections(system: System, chance: random.Random) -> tuple[int, str]:
    count = 0
    with _superuser(system) as connection:
        for _ in range(12):
            count += connection.execute(_TERMINATE).rowcount
            system.wait(chance.uniform(0.05, 0.3))
    return count, f"terminated {count} connections"


def serializable(system: System, chance: random.Random) -> tuple[int, str]:
    """Transactions that meet each other are refused, instead of waiting."""
    assert system.postgres is not None
    before = _refusals(system.postgres.log)
    with _superuser(system) as connection:
        name = connection.info.dbname
        for level in ("serializable", "read committed"):
            connection.execute(
                f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{level}'"
            )
            connection.execute(_TERMINATE)
            system.wait(3.0 if level == "serializable" else 0.0)
    struck = _refusals(system.postgres.log) - before
    return struck, f"3 s of serializable transactions, {struck} of them refused"


def _refusals(log: Path) -> int:
    return log.read_text(errors="replace").count("ERROR:  could not serialize access")


def take_all_connections(system: System, chance: random.Random) -> tuple[int, str]:
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
    return count, f"held {count} connections, all that the server has"


def lock_the_jobs(system: System, chance: random.Random) -> tuple[int, str]:
    """Every transaction waits until the pools are exhausted."""
    with _superuser(system) as connection, connection.transaction():
        connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        system.wait(LEASE_SECONDS + chance.uniform(0.5, 2.0))
        row = connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
    return 0 if row is None else row[0], "locked the table of jobs for longer than a lease"


def lock_sqlite(system: System, chance: random.Random) -> tuple[int, str]:
    engine = sqlalchemy.create_engine(system.database_url)
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        system.wait(chance.uniform(1.0, LEASE_SECONDS + 1.0))
        connection.exec_driver_sql("ROLLBACK")
    engine.dispose()
    return 1, "held SQLite's writer"


def cut_commits(system: System, chance: random.Random) -> tuple[int, str]:
    """The answer to a COMMIT does not come; half of them were made."""
    made = chance.random() < 0.5
    proxy = system.database_proxy
    before = proxy.struck
    proxy.drop_after(b"COMMIT", passed_on=made, times=math.inf)
    system.wait(chance.uniform(1.0, 2.0))
    system.wait_for(lambda: proxy.struck - before >= 3, 8)
    proxy.heal()
    struck = proxy.struck - before
    return struck, f"cut {struck} commits off, {'made' if made else 'not made'}"


# --- the network and the store ---------------------------------------------------------------


def partition(what: str, *, longer_than_lease: bool) -> Run:
    """Bytes stop flowing between the first worker (and API) and a server, and flow again later."""

    def run(system: System, chance: random.Random) -> tuple[int, str]:
        proxy = getattr(system, f"{what}_proxy")
        seconds = chance.uniform(0.5, 1.5) + (LEASE_SECONDS if longer_than_lease else 0.0)
        proxy.stall()
        system.wait(seconds)
        proxy.heal()
        return 1, f"no way to the {what} for {seconds:.1f} s"

    return run


def cut_off(what: str) -> Run:
    def run(system: System, chance: random.Random) -> tuple[int, str]:
        proxy = getattr(system, f"{what}_proxy")
        proxy.cut()
        system.wait(chance.uniform(0.2, 2.0))
        proxy.heal()
        return 1, f"connections to the {what} reset and refused"

    return run


def lie_about_pictures(system: System, chance: random.Random) -> tuple[int, str]:
    lies = [Refuse(), Refuse(503, "SlowDown"), Truncate(), Shorten(), WrongETag(), Reset()]
    before = len(system.store.requests)

    def told() -> int:
        return sum(each.fault is not None for each in system.store.requests[before:])

    system.store.lie_at_random([*lies, Silence(), Slow()], share=0.3, seed=chance.getrandbits(32))
    system.wait(chance.uniform(1.5, 2.5))
    system.wait_for(lambda: told() >= 3, 8)
    system.store.heal()
    return told(), f"{told()} of the store's answers were wrong"


# --- pictures --------------------------------------------------------------------------------


def replace_pictures(system: System, chance: random.Random) -> tuple[int, str]:
    """Between the submission of jobs that use them and their runs, too."""
    names = chance.sample(system.gallery.pictures.names, 6)
    with standing_still(system.workers):
        system.wait(LEASE_SECONDS / 3)
        for name in names:
            system.gallery.replace(name, chance.getrandbits(32))
    system.wait(1.0)
    return len(names), f"replaced {len(names)} pictures"


def delete_pictures(system: System, chance: random.Random) -> tuple[int, str]:
    """They come back when all is healed. Struck are the jobs that failed because of it."""
    names = chance.sample(system.gallery.pictures.names, 6)
    newest = system.newest_job()
    failed = (
        select(func.count())
        .where(Job.id > newest, Job.error_code == ImageNotFound.code)
        .where(or_(*(Job.error_message.contains(name) for name in names)))
    )
    struck = 0

    def some_failed() -> bool:
        nonlocal struck
        struck = system.ask(lambda session: session.scalar(failed)) or 0
        return struck > 0

    with standing_still(system.workers):
        system.wait(LEASE_SECONDS / 3)
        for name in names:
            system.gallery.delete(name)
    system.wait(1.0)
    system.wait_for(some_failed, 8)
    return struck, f"deleted {len(names)} pictures, which {struck} jobs missed"


# --- the rest --------------------------------------------------------------------------------


def clock_off(system: System, chance: random.Random) -> tuple[int, str]:
    """Two workers whose clocks are five minutes off. They claim jobs, one of them renews its
    leases, and the one that is ahead dies with some: they must be taken from it as from any."""
    early, late = chance.sample(system.workers, 2)
    with (
        system.with_environment(early, **{clock.SETTING: "300"}),
        system.with_environment(late, **{clock.SETTING: "-300"}),
    ):
        system.wait_for(lambda: min(system.claimed_by(early), system.claimed_by(late)) > 9, 20)
        system.wait(chance.uniform(1.0, 2.0))
        claims = [system.claimed_by(early), system.claimed_by(late)]
        system.wait_for(lambda: system.held_by(early) > 0, 5)
        early.kill()
    words = f"{early.name} was 5 minutes ahead and took {claims[0]} jobs, {late.name} was behind"
    return min(claims), f"{words} and took {claims[1]}"


def fill_the_disk(system: System, chance: random.Random) -> tuple[int, str]:
    """Of the data folders (the cache of images), and of SQLite."""
    if system.disk is None:
        return 0, "nothing: this machine lets the tests mount no disk"
    system.disk.fill()
    system.wait(chance.uniform(1.0, LEASE_SECONDS + 1.0))
    system.disk.make_room()
    return 1, "the disk was full"
