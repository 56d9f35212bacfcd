"""What `visq doctor` asks of each server. Every function here may take its time, hang or raise: the
doctor gives it a thread, and waits no longer than it wants to. `visq.cli.findings` judges.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import redis
from amqp.exceptions import AMQPError
from kombu import Connection, Producer
from kombu.exceptions import KombuError

from visq.cli.operator import SOCKET_SECONDS, redis_client
from visq.errors import ConfigurationError, Unavailable
from visq.settings import Settings
from visq.streams import WorkerFailure, WorkerInfo, failed_workers, live_workers

if TYPE_CHECKING:
    from models.checkup import Checkup

SHORTEST_LATE: Final = 30.0
"""Seconds after which work of the maintenance loop is late; more, if its rounds are rare."""
UNTOLD_SECONDS: Final = 60.0
"""Seconds after which the result event of an ended job should have been published."""


@dataclass(frozen=True)
class Database:
    """A database that answers."""

    revision: str | None
    needed: str
    checkup: Checkup | None
    """``None`` if the revision is another than the one that is needed."""


@dataclass(frozen=True)
class Keeping:
    """How a Redis keeps what it holds; ``None``: it does not say (a managed one may refuse)."""

    appendonly: bool | None
    save: str | None
    policy: str | None
    """What it does when its memory is full: `maxmemory-policy`."""
    full: float | None
    """Part of `maxmemory` that is used; ``None`` also if there is no such limit."""
    write_error: str | None
    """Why it refuses writes, or will after its next restart have lost some."""


@dataclass(frozen=True)
class Redis:
    """A Redis that answers."""

    keeping: Keeping
    ahead_seconds: float
    """By how much its clock is ahead of this machine's."""
    uncertain_seconds: float


@dataclass(frozen=True)
class Workers:
    alive: list[WorkerInfo]
    failed: list[WorkerFailure]


def ask_database(settings: Settings) -> Database:
    """:raises ConfigurationError, Unavailable: says why it cannot be asked."""
    from models import checkup, revision

    database = checkup.connect(settings.database)
    try:
        found = checkup.ask_revision(database)
        late = max(SHORTEST_LATE, 10 * settings.maintenance_seconds)
        looked = None
        if found == revision.REVISION:
            looked = database.read(checkup.look, late_seconds=late, untold_seconds=UNTOLD_SECONDS)
        return Database(found, revision.REVISION, looked)
    finally:
        database.close()


def ask_broker(settings: Settings) -> Redis | None:
    """Whether it takes messages; of a Redis how it keeps them.

    :raises Unavailable: it does not.
    """
    from models.checkup import in_one_line
    from worker.queue.app import is_redis

    if is_redis(settings.broker):
        with redis_client(settings.broker, "VISQ_BROKER_URL") as client:
            return _ask_redis(client)
    if not settings.broker.startswith(("amqp://", "amqps://")):
        raise ConfigurationError("VISQ_BROKER_URL must begin with `redis://` or `amqp://`")
    try:
        _publish_one(settings.broker)
    except TimeoutError as error:
        raise Unavailable(
            "it takes connections but no messages: is its memory or its disk full "
            "(`rabbitmq-diagnostics alarms`)?"
        ) from error
    except (KombuError, AMQPError, OSError) as error:
        raise Unavailable(in_one_line(error)) from error
    return None


def _publish_one(url: str) -> None:
    """Send a message to a queue that ends with this connection, and wait for the confirmation: a
    RabbitMQ whose memory or disk is full lets clients in, and then blocks those that publish."""
    options = {"confirm_publish": True}
    with Connection(url, connect_timeout=SOCKET_SECONDS, transport_options=options) as connection:
        channel: Any = connection.default_channel
        name = channel.queue_declare("", exclusive=True, auto_delete=True).queue
        try:
            Producer(channel).publish(
                "visq doctor", routing_key=name, exchange="", confirm_timeout=SOCKET_SECONDS
            )
        except TimeoutError:
            # It reads nothing more, so it would not answer to an orderly close either.
            channel.connection.collect()
            raise


def ask_redis(settings: Settings) -> tuple[Redis, Workers]:
    """:raises Unavailable: it does not answer."""
    with redis_client(settings.redis, "VISQ_REDIS_URL") as client:
        found = _ask_redis(client)
        return found, Workers(live_workers(client), failed_workers(client))


def ask_store(settings: Settings) -> str:
    """What it is, in words.

    :raises ConfigurationError, Unavailable: it does not answer, or cannot be used.
    """
    from visq.objects import open_store, store_folder

    store = open_store(settings)
    try:
        store.ping()
    finally:
        store.close()
    folder = store_folder(settings)
    if folder is None:
        return f"S3 at {settings.s3_endpoint_url or 'AWS'} answers"
    if not folder.exists():
        return f"the first upload makes the folder {folder}"
    return f"{settings.objects} can be read and written"


@dataclass(frozen=True)
class Disk:
    """The disk of a folder on this machine."""

    what: str
    folder: Path
    free: int
    """Bytes."""


def ask_disks(settings: Settings) -> list[Disk]:
    """Of what lies on this machine: SQLite's database, and the object folder."""
    from models.connections import checked_url
    from visq.objects import store_folder

    folders = {}
    with suppress(ConfigurationError):  # "database" tells it
        url = checked_url(settings.database)
        if url.get_backend_name() == "sqlite":
            folders["the database"] = Path(url.database or "").absolute().parent
    with suppress(ConfigurationError):  # "object store" tells it
        if (folder := store_folder(settings)) is not None:
            folders["the object store"] = folder
    found = []
    for what, wanted in folders.items():
        there = next(each for each in (wanted, *wanted.parents) if each.is_dir())
        found.append(Disk(what, there, shutil.disk_usage(there).free))
    return found


def _ask_redis(client: redis.Redis) -> Redis:
    from models.checkup import in_one_line

    try:
        client.ping()
        before = time.time()
        seconds, microseconds = client.time()
        after = time.time()
        keeping = _ask_keeping(client)
    except (redis.RedisError, OSError) as error:
        raise Unavailable(in_one_line(error)) from error
    now = seconds + microseconds / 1e6
    return Redis(keeping, now - (before + after) / 2, (after - before) / 2)


def _ask_keeping(client: redis.Redis) -> Keeping:
    try:
        info: dict[str, Any] = client.info()
    except redis.ResponseError:  # not allowed
        info = {}
    try:
        save = cast("dict[str, str]", client.config_get("save")).get("save")
    except redis.ResponseError:
        save = None
    limit = info.get("maxmemory")
    return Keeping(
        appendonly=bool(info["aof_enabled"]) if "aof_enabled" in info else None,
        save=save,
        policy=info.get("maxmemory_policy"),
        full=info["used_memory"] / limit if limit else None,
        write_error=_write_error(info, save),
    )


def _write_error(info: dict[str, Any], save: str | None) -> str | None:
    if info.get("role") == "slave":
        return "it is a replica, which can only be read"
    if info.get("aof_enabled") and info.get("aof_last_write_status", "ok") != "ok":
        return "its last write to the append-only file failed; is its disk full?"
    if save and info.get("rdb_last_bgsave_status", "ok") != "ok":
        return "its last snapshot failed, and it may refuse writes; is its disk full?"
    return None
