"""``/healthz`` and ``/readyz``: whether this process lives, and whether what it needs answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel
from redis.exceptions import RedisError
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from api import openapi
from api.services import Here, Services
from models.tables import Job
from visq.errors import Unavailable

router = APIRouter(tags=["health"])

CHECK_SECONDS: Final = 5.0
OK: Final = "ok"


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether requests can be served."""

    status: Literal["ready", "not_ready"]
    dependencies: dict[str, str]
    """Name -> ``ok``, or what is wrong."""
    workers: int | None
    """Live workers; jobs are accepted without any. ``None``: Redis is away, so nobody knows."""


DEPENDENCIES: Final = {"database": OK, "broker": OK, "redis": OK, "object_store": OK}
READY: Final = {"status": "ready", "dependencies": DEPENDENCIES, "workers": 2}
NOT_READY: Final = {
    "status": "not_ready",
    "dependencies": DEPENDENCIES | {"redis": "does not answer"},
    "workers": None,
}


@router.get("/healthz", operation_id="healthz", summary="This process lives")
async def healthz() -> Health:
    return Health()


@router.get(
    "/readyz",
    operation_id="readyz",
    summary="Everything that this process needs answers",
    responses={
        200: openapi.example(READY),
        503: {
            "model": Readiness,
            "description": "Something does not answer: `dependencies` says what.",
            **openapi.example(NOT_READY),
        },
    },
)
async def readyz(here: Here, response: Response) -> Readiness:
    checks = {
        "database": _checked(here.database.read(_tables)),
        "broker": _checked(asyncio.to_thread(here.courier.ping)),
        "redis": _checked(_ping_redis(here)),
        "object_store": _checked(asyncio.to_thread(here.store.ping)),
    }
    found = dict(zip(checks, await asyncio.gather(*checks.values()), strict=True))
    ready = all(state == OK for state in found.values())
    response.status_code = 200 if ready else 503
    return Readiness(
        status="ready" if ready else "not_ready",
        dependencies=found,
        workers=await _workers(here),
    )


async def _checked(check: Awaitable[object]) -> str:
    """What is wrong; only in our own words, as those of others may name hosts and passwords."""
    try:
        await asyncio.wait_for(check, CHECK_SECONDS)
    except Unavailable as error:
        return error.message
    except DBAPIError:
        return "has no tables of this version; run `visq migrate`"
    except (TimeoutError, RedisError, OSError):
        return "does not answer"
    return OK


def _tables(session: Session) -> object:
    return session.execute(select(Job).limit(1)).first()


async def _ping_redis(here: Services) -> None:
    await here.redis.ping()


async def _workers(here: Services) -> int | None:
    try:
        return len(await here.workers.alive())
    except Unavailable:
        return None
