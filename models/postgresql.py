"""Connections to PostgreSQL on which no wait is without a limit, at both ends.

The server's end matters to the others: a transaction whose client has vanished holds its locks
until the server ends it.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final, TypeVar

import psycopg
from psycopg.abc import PQGen
from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from models.connections import Limits

R = TypeVar("R")

KEEPALIVES: Final = {"keepalives_idle": 30, "keepalives_interval": 5, "keepalives_count": 3}
"""Whether the server of a connection that nobody uses just now is still there."""


class PatientConnection(psycopg.Connection[Any]):
    """Gives up when the server has been silent for `silence` seconds."""

    silence: float = math.inf

    def wait(self, gen: PQGen[R], *args: Any, **kwargs: Any) -> R:
        return super().wait(_up_to(self.silence, gen, self), *args, **kwargs)


class AsyncPatientConnection(psycopg.AsyncConnection[Any]):
    """`PatientConnection` for the event loop."""

    silence: float = math.inf

    async def wait(self, gen: PQGen[R], *args: Any, **kwargs: Any) -> R:
        return await super().wait(_up_to(self.silence, gen, self), *args, **kwargs)


def _up_to(
    silence: float, gen: PQGen[R], connection: PatientConnection | AsyncPatientConnection
) -> PQGen[R]:
    """`gen`, which waits for the server; psycopg also calls it ten times a second in between."""
    try:
        wanted = next(gen)
        heard = time.monotonic()
        while True:
            ready = yield wanted
            if ready:
                heard = time.monotonic()
            elif time.monotonic() - heard > silence:
                connection.pgconn.finish()  # what may still come belongs to nobody
                raise psycopg.OperationalError(f"the server was silent for {silence:g} s")
            wanted = gen.send(ready)
    except StopIteration as end:
        result: R = end.value
        return result


def configure(engine: Engine, limits: Limits) -> None:
    """Make all connections of `engine` as above. Parameters in its URL go before."""
    given = engine.url.query
    defaults = {"connect_timeout": limits.connect, **KEEPALIVES}

    @event.listens_for(engine, "do_connect")
    def on_do_connect(_dialect: Any, _record: Any, _args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs |= {name: value for name, value in defaults.items() if name not in given}
        if engine.dialect.is_async:
            kwargs["async_creator_fn"] = AsyncPatientConnection.connect
            return None
        return PatientConnection.connect(**kwargs)

    @event.listens_for(engine, "connect")
    def on_connect(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        driver: Any = record.driver_connection
        driver.silence = limits.silence
        if "options" in given:
            return
        # Not as `options` of the connection: poolers such as PgBouncer refuse what they don't know.
        cursor = connection.cursor()
        cursor.execute(
            "SELECT set_config('statement_timeout', %s, false),"
            " set_config('idle_in_transaction_session_timeout', %s, false)",
            [
                f"{limits.statement * 1000:.0f}",
                "0" if math.isinf(limits.silence) else f"{limits.silence * 1000:.0f}",
            ],
        )
        cursor.close()
        connection.commit()
