"""What the routes share: opened when the API starts, closed when it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Final, cast

import redis.asyncio
from fastapi import Depends, Request
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from sqlalchemy.exc import DBAPIError

from api.delivery import Delivery
from api.keys import Keys
from api.watch import Watch
from api.workers import Workers
from models import reading
from models.database import AsyncDatabase, Database
from visq.errors import ConfigurationError
from visq.objects import ObjectStore, open_store
from visq.settings import Settings
from worker.queue import BatchLoop, Courier, Maintenance

REDIS_SECONDS: Final = 3.0
"""Longest wait for Redis: nothing here depends on it, so a silent one must not hold requests."""


@dataclass(frozen=True)
class Services:
    """The open connections of one API process."""

    settings: Settings
    database: AsyncDatabase
    keys: Keys
    tenants: dict[str, str]
    """Name -> id."""
    redis: redis.asyncio.Redis
    store: ObjectStore
    courier: Courier
    blocking: Database
    """The same database, for threads."""
    maintenance: Maintenance
    batch_loop: BatchLoop
    delivery: Delivery
    watch: Watch
    workers: Workers


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    """Connect to everything.

    :raises ConfigurationError: the database has no tables, or a setting is wrong.
    :raises Unavailable: the database does not answer.
    """
    database = AsyncDatabase(settings.database)
    blocking_database = Database(settings.database)
    courier = Courier(settings, blocking_database)
    maintenance = Maintenance(settings, blocking_database, courier)
    client = _connect_redis(settings)
    store = open_store(settings)
    batch_loop = BatchLoop(
        settings, blocking_database, store, courier, maintenance.wake_for_windows
    )
    delivery = Delivery(courier)
    watch = Watch(client, database)
    try:
        tenants = await asyncio.to_thread(ensure_tenants, blocking_database, settings)
        maintenance.start()
        batch_loop.start()
        watch.start()
        yield Services(
            settings=settings,
            database=database,
            keys=Keys(settings.tenants),
            tenants=tenants,
            redis=client,
            store=store,
            courier=courier,
            blocking=blocking_database,
            maintenance=maintenance,
            batch_loop=batch_loop,
            delivery=delivery,
            watch=watch,
            workers=Workers(client),
        )
    finally:
        await watch.stop()
        await delivery.close()
        await asyncio.to_thread(batch_loop.stop)
        await asyncio.to_thread(maintenance.stop)
        await asyncio.to_thread(courier.close)
        await client.aclose()
        await asyncio.to_thread(store.close)
        await asyncio.to_thread(blocking_database.close)
        await database.close()


def _connect_redis(settings: Settings) -> redis.asyncio.Redis:
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
        settings.redis,
        socket_timeout=REDIS_SECONDS,
        socket_connect_timeout=REDIS_SECONDS,
        health_check_interval=30,
        retry=Retry(ConstantBackoff(0.05), 1),
    )
    return client


def ensure_tenants(database: Database, settings: Settings) -> dict[str, str]:
    """Name -> id of the tenants that have keys, created where missing.

    :raises ConfigurationError: the database has no tables.
    :raises Unavailable: the database does not answer.
    """
    try:
        return database.run(reading.ensure_tenants, list(settings.tenants))
    except DBAPIError as error:
        raise ConfigurationError(
            "the database has no tables of this version; run `visq migrate` first"
        ) from error


def services(request: Request) -> Services:
    """The services, as FastAPI hands them to a route."""
    return cast("Services", request.app.state.services)


async def _services(request: Request) -> Services:
    # A coroutine: FastAPI would run a plain function in a thread.
    return services(request)


Here = Annotated[Services, Depends(_services)]
