"""How connections to the database are made, and how long anybody waits for it.

Nobody waits for ever. A server may be silent without being gone (a partition of the network, a
stopped machine): TCP alone finds that after minutes or never, so every wait has a limit here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.engine import Connection
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError

from visq.errors import ConfigurationError

SQLITE_BUSY_MS = 10_000
"""How long SQLite waits for the writer of another process."""


@dataclass(frozen=True)
class Limits:
    """Seconds after which a wait ends as an outage. Parameters in the database's URL go before."""

    pool: float = 10.0
    """For a free connection of the pool; on SQLite also for the process's turn to write."""
    connect: int = 5
    """For a new connection, to each host of the URL; PostgreSQL's client knows whole seconds."""
    statement: float = 15.0
    """For one statement, by the server's clock: locks that it waits for included."""
    silence: float = 20.0
    """For the next sign of life from the server. Longer than `statement`: a server that lives
    answers by then, and the connection stays. Shorter than the usual lease (30 s)."""


USUAL: Final = Limits()

MIGRATING: Final = Limits(statement=0.0, silence=math.inf)
"""A migration may build an index for an hour."""


def checked_url(url: str) -> URL:
    """:raises ConfigurationError: visq does not use such a database."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:  # it says the URL, and so perhaps a password
        raise ConfigurationError("VISQ_DATABASE_URL is not the URL of a database") from error
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("VISQ_DATABASE_URL: SQLite needs a file, not `:memory:`")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigurationError(
            "VISQ_DATABASE_URL must begin with `sqlite:///` or `postgresql+psycopg://`"
        )
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def pool_arguments(pool_size: int, limits: Limits) -> dict[str, Any]:
    """Of the engine: at most twice `pool_size` connections, each looked at before it is used."""
    return {
        "pool_size": pool_size,
        "max_overflow": pool_size,
        "pool_pre_ping": True,
        "pool_timeout": limits.pool,
        "hide_parameters": True,  # errors go to the logs, prompts do not
    }


def configure_sqlite(engine: Engine) -> None:
    """WAL, and transactions that are begun by SQLAlchemy: ``BEGIN IMMEDIATE`` to write."""

    @event.listens_for(engine, "connect")
    def on_connect(connection: DBAPIConnection, _record: object) -> None:
        connection.isolation_level = None  # SQLAlchemy sends BEGIN, not the driver
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",
            f"busy_timeout={SQLITE_BUSY_MS}",
            "foreign_keys=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        read_only = connection.get_execution_options().get("visq_read_only", False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def configure_postgresql(engine: Engine, limits: Limits) -> None:
    """`models.postgresql.configure`; who uses SQLite only does not load psycopg."""
    from models import postgresql

    postgresql.configure(engine, limits)
