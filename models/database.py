"""Connections, transactions, the database's clock, and the one place of tenant isolation.

``Database`` (worker, sync) and ``AsyncDatabase`` (API) run the same functions:

    job = database.run(jobs.claim, job_id, worker="w1", lease_seconds=30)
    job = await async_database.run(jobs.cancel, job_id, tenant=tenant.id)

SQLite runs in WAL with ``BEGIN IMMEDIATE`` and one writer a process: a plain BEGIN that upgrades to
a write fails at once whatever the busy timeout, and SQLite's own busy wait is unfair.
"""

from __future__ import annotations

import asyncio
import sqlite3
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, TypeVarTuple

from sqlalchemy import (
    URL,
    DateTime,
    Dialect,
    Engine,
    Float,
    LargeBinary,
    bindparam,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.engine import Connection, Result
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import ORMExecuteState, Session, sessionmaker, with_loader_criteria
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import TypedReturnsRows
from sqlalchemy.types import TypeDecorator

from visq import points
from visq.errors import ConfigurationError, Unavailable

P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

SQLITE_BUSY_MS = 10_000


class UTCDateTime(TypeDecorator[datetime]):
    """A timezone-aware ``datetime`` in UTC on every database."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class PackedInts(TypeDecorator[list[int]]):
    """A list of integers (int32) in four bytes each, little-endian.

    As JSONB, each one would take at least three times that, and would be parsed at every turn.
    """

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: list[int] | None, dialect: Dialect) -> bytes | None:
        return None if value is None else struct.pack(f"<{len(value)}i", *value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> list[int] | None:
        return None if value is None else [number for (number,) in struct.iter_unpack("<i", value)]


class db_now(FunctionElement[datetime]):  # noqa: N801 (an SQL function)
    """The database's clock, plus `seconds`. Leases and deadlines use no other clock.

    `seconds` may be a parameter of the statement, by its name; of None, the time is NULL.
    """

    type = UTCDateTime()
    inherit_cache = True
    name = "db_now"

    def __init__(self, seconds: float | str = 0.0) -> None:
        if isinstance(seconds, str):
            super().__init__(bindparam(seconds, type_=Float()))
        else:
            super().__init__(bindparam(None, float(seconds), type_=Float()))


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    # statement_timestamp(): the time of this statement, not of the transaction's start, and (unlike
    # clock_timestamp()) stable, so that an index on the compared column is used.
    seconds = compiler.process(element.clauses, **kw)
    return f"(statement_timestamp() + make_interval(secs => CAST({seconds} AS double precision)))"


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: SQLCompiler, **kw: Any) -> str:
    # Milliseconds padded to the six digits in which SQLAlchemy stores and compares times.
    seconds = compiler.process(element.clauses, **kw)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {seconds} || ' seconds') || '000')"


class TenantSession(Session):
    """A session that sees only the rows of the tenant in ``info["tenant_id"]``, if one is set."""


@event.listens_for(TenantSession, "do_orm_execute")
def _scope_by_tenant(state: ORMExecuteState) -> None:
    # The one place of tenant isolation: every SELECT, UPDATE and DELETE of the ORM passes here.
    from models.tables import TenantOwned

    tenant_id = state.session.info.get("tenant_id")
    if tenant_id is not None:
        state.statement = state.statement.options(
            with_loader_criteria(
                TenantOwned, lambda owned: owned.tenant_id == tenant_id, include_aliases=True
            )
        )


def fetch(
    session: Session, statement: TypedReturnsRows[*Ts], parameters: Mapping[str, Any]
) -> Result[*Ts]:
    """Run a statement of the ORM's classes that returns columns, in the scope of `session`.

    Where there is no scope, it goes past the ORM, which takes longer than the statement does.
    Objects of the session are neither flushed before nor refreshed after.
    """
    if session.info.get("tenant_id") is None:
        return session.connection().execute(statement, parameters)
    return session.execute(statement, parameters)


def _configure_sqlite(engine: Engine) -> None:
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


def _checked_url(url: str) -> URL:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("VISQ_DATABASE_URL: SQLite needs a file, not `:memory:`")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigurationError(
            "VISQ_DATABASE_URL must begin with `sqlite:///` or `postgresql+psycopg://`"
        )
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


@contextmanager
def _typed_outage() -> Iterator[None]:
    """What may pass by itself becomes ``Unavailable``; every other database error is a bug."""
    try:
        yield
    except PoolTimeoutError as error:
        raise Unavailable("all connections to the database are in use; try again") from error
    except DBAPIError as error:
        if error.connection_invalidated or _cannot_connect(error):
            raise Unavailable("the database does not answer; try again") from error
        if _gave_way(error):
            raise Unavailable("the database is too busy for this just now; try again") from error
        raise


def _cannot_connect(error: DBAPIError) -> bool:
    # psycopg reports a refused or broken connection as OperationalError without an SQLSTATE.
    module = type(error.orig).__module__
    return module.startswith("psycopg") and getattr(error.orig, "sqlstate", None) is None


_GAVE_WAY: Final = (
    "40",  # transaction rolled back: deadlock, serialization failure
    "53",  # insufficient resources: connections, disk, memory
    "55P03",  # lock not available
    "57",  # operator intervention: shutdown, statement cancelled
)
"""Beginnings of PostgreSQL's SQLSTATEs for a transaction that may succeed when it is repeated."""


def _gave_way(error: DBAPIError) -> bool:
    """Whether others were in the way: the transaction was rolled back, and can be repeated."""
    if isinstance(error.orig, sqlite3.OperationalError):
        # The low byte is the primary code, whatever the extended one says.
        return error.orig.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
    return str(getattr(error.orig, "sqlstate", None)).startswith(_GAVE_WAY)


class Database:
    """Transactions for threads. `url` is a SQLAlchemy URL; `pool_size` bounds the connections."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        parsed = _checked_url(url)
        self.engine = create_engine(
            parsed, pool_size=pool_size, max_overflow=pool_size, pool_pre_ping=True
        )
        self._writer: AbstractContextManager[Any] = nullcontext()
        if parsed.get_backend_name() == "sqlite":
            _configure_sqlite(self.engine)
            self._writer = threading.Lock()
        self._sessions = sessionmaker(self.engine, class_=TenantSession, expire_on_commit=False)

    def run(
        self,
        function: Callable[Concatenate[Session, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Run ``function(session, ...)`` in one transaction; commit, or roll back on an error.

        :raises Unavailable: the database does not answer. The fate of the transaction is unknown.
        """
        with _typed_outage(), self._writer, self._sessions.begin() as session:
            result = function(session, *args, **kwargs)
            points.reached("transaction.committing")
        points.reached("transaction.committed")
        return result

    def read(
        self,
        function: Callable[Concatenate[Session, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Run a function that only reads; on SQLite it does not wait for the writer."""
        with _typed_outage(), self._sessions.begin() as session:
            session.connection(execution_options={"visq_read_only": True})
            return function(session, *args, **kwargs)

    def ping(self) -> None:
        """:raises Unavailable: the database does not answer."""
        self.read(lambda session: session.execute(text("SELECT 1")))

    def close(self) -> None:
        self.engine.dispose()


class AsyncDatabase:
    """Transactions for the event loop, over the same functions; ``tenant=`` scopes all of it."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        parsed = _checked_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        if is_sqlite:
            parsed = parsed.set(drivername="sqlite+aiosqlite")
        self.engine = create_async_engine(
            parsed, pool_size=pool_size, max_overflow=pool_size, pool_pre_ping=True
        )
        self._writer = asyncio.Lock() if is_sqlite else None
        if is_sqlite:
            _configure_sqlite(self.engine.sync_engine)
        self._sessions = async_sessionmaker(
            self.engine, expire_on_commit=False, sync_session_class=TenantSession
        )

    async def run(
        self,
        function: Callable[Concatenate[Session, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """As `Database.run`, for all tenants."""
        async with self._transaction(None, read_only=False) as session:
            return await session.run_sync(function, *args, **kwargs)

    async def read(
        self,
        function: Callable[Concatenate[Session, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """As `Database.read`, for all tenants."""
        async with self._transaction(None, read_only=True) as session:
            return await session.run_sync(function, *args, **kwargs)

    def for_tenant(self, tenant_id: str) -> TenantDatabase:
        """The same database, seen by one tenant: other tenants' rows do not exist."""
        return TenantDatabase(self, tenant_id)

    async def ping(self) -> None:
        """:raises Unavailable: the database does not answer."""
        await self.read(lambda session: session.execute(text("SELECT 1")))

    async def close(self) -> None:
        await self.engine.dispose()

    @asynccontextmanager
    async def _transaction(
        self, tenant_id: str | None, *, read_only: bool
    ) -> AsyncIterator[AsyncSession]:
        writer = nullcontext() if self._writer is None or read_only else self._writer
        async with writer, self._session(tenant_id, read_only=read_only) as session:
            yield session

    @asynccontextmanager
    async def _session(
        self, tenant_id: str | None, *, read_only: bool
    ) -> AsyncIterator[AsyncSession]:
        with _typed_outage():
            async with self._sessions.begin() as session:
                session.sync_session.info["tenant_id"] = tenant_id
                if read_only:
                    await session.connection(execution_options={"visq_read_only": True})
                yield session
                if not read_only:
                    points.reached("transaction.committing")
        if not read_only:
            points.reached("transaction.committed")


class TenantDatabase:
    """What a route gets: every statement in it is scoped to its tenant."""

    def __init__(self, database: AsyncDatabase, tenant_id: str) -> None:
        self._database = database
        self.tenant_id = tenant_id

    async def run(
        self,
        function: Callable[Concatenate[Session, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        async with self._database._transaction(self.tenant_id, read_only=False) as session:
            return await session.run_sync(function, *args, **kwargs)

    async def read(
        self,
        function: Callable[Concatenate[Session, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        async with self._database._transaction(self.tenant_id, read_only=True) as session:
            return await session.run_sync(function, *args, **kwargs)
