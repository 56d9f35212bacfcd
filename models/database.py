"""Connections, transactions, the database's clock, and the one place of tenant isolation.

``Database`` (worker, sync) and ``AsyncDatabase`` (API) run the same functions:

    job = database.run(jobs.claim, job_id, worker="w1", lease_seconds=30)
    job = await async_database.run(jobs.cancel, job_id, tenant=tenant.id)

SQLite runs in WAL with ``BEGIN IMMEDIATE`` and one writer a process: a plain BEGIN that upgrades to
a write fails at once whatever the busy timeout, and SQLite's own busy wait is unfair.
"""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any, Concatenate, ParamSpec, TypeVar, TypeVarTuple

from sqlalchemy import (
    DateTime,
    Dialect,
    Float,
    LargeBinary,
    bindparam,
    create_engine,
    event,
    text,
)
from sqlalchemy.engine import Result
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import ORMExecuteState, Session, sessionmaker, with_loader_criteria
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import TypedReturnsRows
from sqlalchemy.types import TypeDecorator

from models import outages
from models.connections import (
    USUAL,
    Limits,
    checked_url,
    configure_postgresql,
    configure_sqlite,
    pool_arguments,
)
from visq import points
from visq.errors import Unavailable

P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


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
    from models.base import TenantOwned

    tenant_id = state.session.info.get("tenant_id")
    if tenant_id is not None:
        state.statement = state.statement.options(
            with_loader_criteria(
                TenantOwned, lambda owned: owned.tenant_id == tenant_id, include_aliases=True
            )
        )


def as_tenant(session: Session, tenant_id: str) -> None:
    """From here on, this session sees only the rows of the tenant."""
    session.info["tenant_id"] = tenant_id


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


class Database:
    """Transactions for threads. `url` is a SQLAlchemy URL; `pool_size` bounds the connections."""

    def __init__(self, url: str, *, pool_size: int = 10, limits: Limits = USUAL) -> None:
        parsed = checked_url(url)
        self.engine = create_engine(parsed, **pool_arguments(pool_size, limits))
        self._writer: AbstractContextManager[Any] = nullcontext()
        if parsed.get_backend_name() == "sqlite":
            configure_sqlite(self.engine)
            self._writer = _Turns(limits.pool)
        else:
            configure_postgresql(self.engine, limits)
        self._sessions = sessionmaker(self.engine, class_=TenantSession, expire_on_commit=False)

    def run(
        self,
        function: Callable[Concatenate[Session, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Run ``function(session, ...)`` in one transaction; commit, or roll back on an error.

        What the database has rolled back because of others (a deadlock, a serialization failure)
        is run again a few times: the function does nothing but read and write the session.

        :raises Unavailable: the database does not answer. The fate of the transaction is unknown.
        """
        return self._repeated(lambda session: function(session, *args, **kwargs), read_only=False)

    def read(
        self,
        function: Callable[Concatenate[Session, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Run a function that only reads; on SQLite it does not wait for the writer."""
        return self._repeated(lambda session: function(session, *args, **kwargs), read_only=True)

    def ping(self) -> None:
        """:raises Unavailable: the database does not answer."""
        self.read(lambda session: session.execute(text("SELECT 1")))

    def close(self) -> None:
        self.engine.dispose()

    def _repeated(self, function: Callable[[Session], R], *, read_only: bool) -> R:
        repeats = 0
        with outages.typed():
            while True:
                try:
                    return self._once(function, read_only)
                except DBAPIError as error:
                    pause = outages.pause_before_repeat(error, repeats)
                    if pause is None:
                        raise
                time.sleep(pause)
                repeats += 1

    def _once(self, function: Callable[[Session], R], read_only: bool) -> R:
        writer = nullcontext() if read_only else self._writer
        with writer, self._sessions.begin() as session:
            if read_only:
                session.connection(execution_options={"visq_read_only": True})
                return function(session)
            result = function(session)
            points.reached("transaction.committing")
        points.reached("transaction.committed")
        return result


class AsyncDatabase:
    """Transactions for the event loop, over the same functions; ``tenant=`` scopes all of it."""

    def __init__(self, url: str, *, pool_size: int = 10, limits: Limits = USUAL) -> None:
        parsed = checked_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        if is_sqlite:
            parsed = parsed.set(drivername="sqlite+aiosqlite")
        self.engine = create_async_engine(parsed, **pool_arguments(pool_size, limits))
        self._writer: AbstractAsyncContextManager[Any] = nullcontext()
        if is_sqlite:
            configure_sqlite(self.engine.sync_engine)
            self._writer = _AsyncTurns(limits.pool)
        else:
            configure_postgresql(self.engine.sync_engine, limits)
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
        return await self._repeated(
            None, lambda session: function(session, *args, **kwargs), read_only=False
        )

    async def read(
        self,
        function: Callable[Concatenate[Session, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """As `Database.read`, for all tenants."""
        return await self._repeated(
            None, lambda session: function(session, *args, **kwargs), read_only=True
        )

    def for_tenant(self, tenant_id: str) -> TenantDatabase:
        """The same database, seen by one tenant: other tenants' rows do not exist."""
        return TenantDatabase(self, tenant_id)

    async def ping(self) -> None:
        """:raises Unavailable: the database does not answer."""
        await self.read(lambda session: session.execute(text("SELECT 1")))

    async def close(self) -> None:
        await self.engine.dispose()

    async def _repeated(
        self, tenant_id: str | None, function: Callable[[Session], R], *, read_only: bool
    ) -> R:
        repeats = 0
        with outages.typed():
            while True:
                try:
                    return await self._once(tenant_id, function, read_only)
                except DBAPIError as error:
                    pause = outages.pause_before_repeat(error, repeats)
                    if pause is None:
                        raise
                await asyncio.sleep(pause)
                repeats += 1

    async def _once(
        self, tenant_id: str | None, function: Callable[[Session], R], read_only: bool
    ) -> R:
        writer = nullcontext() if read_only else self._writer
        async with writer, self._sessions.begin() as session:
            if tenant_id is not None:
                as_tenant(session.sync_session, tenant_id)
            if read_only:
                await session.connection(execution_options={"visq_read_only": True})
                return await session.run_sync(function)
            result = await session.run_sync(function)
            points.reached("transaction.committing")
        points.reached("transaction.committed")
        return result


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
        return await self._database._repeated(
            self.tenant_id, lambda session: function(session, *args, **kwargs), read_only=False
        )

    async def read(
        self,
        function: Callable[Concatenate[Session, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        return await self._database._repeated(
            self.tenant_id, lambda session: function(session, *args, **kwargs), read_only=True
        )


class _Turns:
    """The turns of a process's threads to write to SQLite."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._seconds):
            raise _other_writers()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _AsyncTurns:
    """`_Turns` for the event loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._lock.acquire()
        except TimeoutError:
            raise _other_writers() from None

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


def _other_writers() -> Unavailable:
    return Unavailable("the database is too busy for this just now; try again")
