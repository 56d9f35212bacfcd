"""Which errors of the database may pass by themselves, and which transactions to repeat at once.

Every other error of the database is a bug, and stays what it is.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from visq.errors import Unavailable

REPEATS: Final = 6
"""Of a transaction that others made the database roll back."""

FIRST_PAUSE: Final = 0.01
"""Seconds before the first repeat, about; the next ones are twice as long each."""

_ROLLED_BACK: Final = (
    "40001",  # serialization failure
    "40P01",  # deadlock
    "23505",  # unique violation: with serializable transactions, also of rows that we do not see
)
"""PostgreSQL's SQLSTATEs after which the same transaction may succeed at once."""

_BUSY: Final = (
    "40",  # transaction rolled back: deadlock, serialization failure
    "53",  # insufficient resources: connections, disk, memory
    "55P03",  # lock not available
    "57014",  # statement cancelled, by its time limit
)
"""Beginnings of PostgreSQL's SQLSTATEs for a transaction that may succeed when it is repeated."""

_UNABLE: Final = (
    "08",  # connection exception
    "25006",  # read-only: after a failover, this is no longer the primary
    "25P03",  # idle in transaction for too long: this process was stopped
    "57",  # operator intervention: shutdown, start
    "58",  # system error: input and output
)
"""The same, for a server that cannot do it just now."""

_SQLITE_MAY_PASS: Final = {
    sqlite3.SQLITE_BUSY: "the database is too busy for this just now; try again",
    sqlite3.SQLITE_FULL: "the disk of the database is full; try again when there is room",
    sqlite3.SQLITE_IOERR: "the disk of the database failed; try again",
    sqlite3.SQLITE_CANTOPEN: "the database's file cannot be opened; try again",
    sqlite3.SQLITE_READONLY: "the database's file cannot be written; try again",
    sqlite3.SQLITE_PROTOCOL: "the database is too busy for this just now; try again",
}


@contextmanager
def typed() -> Iterator[None]:
    """:raises Unavailable: for what may pass by itself."""
    try:
        yield
    except PoolTimeoutError as error:
        raise Unavailable("all connections to the database are in use; try again") from error
    except DBAPIError as error:
        message = _passing(error)
        if message is None:
            raise
        raise Unavailable(message) from error


def pause_before_repeat(error: DBAPIError, repeats: int) -> float | None:
    """Seconds; None if the transaction is not to be repeated.

    It is repeated if the database has certainly rolled it back, because of others. After a lost
    connection nobody knows, and only the caller can tell what it means to do it twice.
    """
    if error.connection_invalidated or repeats == REPEATS or _sqlstate(error) not in _ROLLED_BACK:
        return None
    pause: float = FIRST_PAUSE * 2**repeats
    return pause * random.uniform(0.5, 1.5)


def _passing(error: DBAPIError) -> str | None:
    """What to say of an error that may pass."""
    if error.connection_invalidated:
        return "the database does not answer; try again"
    if isinstance(error.orig, sqlite3.Error):
        # The low byte is the primary code, whatever the extended one says.
        return _SQLITE_MAY_PASS.get(getattr(error.orig, "sqlite_errorcode", 0) & 0xFF)
    state = _sqlstate(error)
    if state is None:
        # So psycopg reports a connection that is refused or broken; but also a value that it
        # cannot send, which is an error of another class.
        away = isinstance(error, OperationalError | InterfaceError)
        return "the database does not answer; try again" if away else None
    if state.startswith(_BUSY):
        return "the database is too busy for this just now; try again"
    return "the database cannot do this just now; try again" if state.startswith(_UNABLE) else None


def _sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)
