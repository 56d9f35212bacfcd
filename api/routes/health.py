"""``/healthz`` and ``/readyz``: whether this process lives, and whether what it needs answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final, Literal, TypeVar

from fastapi import APIRouter, Response
from pydantic import BaseModel
from redis.exceptions import RedisError
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from api import openapi
from api.services import Here, Services
from api.workers import Seen
from models import dead_letters
from models.tables import Job
from visq.errors import Unavailable
from visq.streams import WorkerFailure

T = TypeVar("T")

router = APIRouter(tags=["health"])

CHECK_SECONDS: Final = 3.0
COUNT_SECONDS: Final = 1.0
"""For what is only told. Together below the 5 s that `visq health` waits: a server that is silent
is to be named, and not this API."""
MOST_DEAD_LETTERS: Final = 1000
"""Counted at most: a probe comes every few seconds."""
OK: Final = "ok"


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class EngineDown(BaseModel):
    worker: str
    model: str
    reason: str


class Readiness(BaseModel):
    """Whether requests can be served."""

    status: Literal["ready", "not_ready"]
    dependencies: dict[str, str]
    """Name -> ``ok``, or what is wrong."""
    workers: int | None
    """Live workers; jobs are accepted without any. ``None``: Redis is away, so nobody knows."""
    failed_workers: list[WorkerFailure]
    """Workers that could not load their model in the last minutes, and why. They take no jobs."""
    engines_down: list[EngineDown]
    """Live workers whose engine is down, and why. They claim no jobs until it is up again."""
    dead_letters: int | None
    """Jobs that failed for a reason that may pass, with their attempts used up; 1000: so many or
    more. ``None``: the database is away. `visq dead` shows them, and retries them."""


DEPENDENCIES: Final = {"database": OK, "broker": OK, "redis": OK, "object_store": OK}
READY: Final = {
    "status": "ready",
    "dependencies": DEPENDENCIES,
    "workers": 2,
    "failed_workers": [],
    "engines_down": [],
    "dead_letters": 0,
}
NO_MODEL: Final = READY | {
    "workers": 0,
    "failed_workers": [
        {
            "host": "gpu-7",
            "model": "/models/mine",
            "reason": "VISQ_MODEL=/models/mine: the model cannot be loaded: no such folder",
            "at": "2026-11-25T10:00:00Z",
        }
    ],
}
NOT_READY: Final = READY | {
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
        200: {
            "description": (
                "Requests are served, and jobs accepted: also while no worker lives, since jobs "
                "wait. If that is because workers cannot load their model, `failed_workers` says "
                "why."
            ),
            **openapi.examples(
                {"ready": READY, "ready, but no worker could load its model": NO_MODEL}
            ),
        },
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
    # A disk that is nearly full is no reason not to be ready, as all that only reads goes on (what
    # does not fit is answered by 503); `visq doctor` looks at it.
    seen, dead = await asyncio.gather(
        _workers(here, found["redis"]), _dead_letters(here, found["database"])
    )
    return Readiness(
        status="ready" if ready else "not_ready",
        dependencies=found,
        workers=None if seen is None else len(seen.alive),
        failed_workers=[] if seen is None else seen.failed,
        engines_down=[] if seen is None else _engines_down(seen),
        dead_letters=dead,
    )


async def _checked(check: Awaitable[object]) -> str:
    """What is wrong; only in our own words, as those of others may name hosts and passwords."""
    try:
        await _within(CHECK_SECONDS, check)
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


async def _within(seconds: float, asked: Awaitable[T]) -> T:
    """As `asyncio.wait_for`, but does not wait for the end of what it cancels: a driver may try for
    seconds to tell a silent server.

    :raises TimeoutError: there is no answer.
    """
    task = asyncio.ensure_future(asked)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if done:
        return task.result()
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    task.cancel()
    raise TimeoutError


async def _workers(here: Services, redis: str) -> Seen | None:
    if redis != OK:
        return None
    try:
        return await _within(COUNT_SECONDS, here.workers.look())
    except (Unavailable, TimeoutError):
        return None


def _engines_down(seen: Seen) -> list[EngineDown]:
    return [
        EngineDown(worker=each.id, model=each.model, reason=each.engine_down)
        for each in seen.alive
        if each.engine_down is not None
    ]


async def _dead_letters(here: Services, database: str) -> int | None:
    if database != OK:
        return None
    try:
        return await _within(
            COUNT_SECONDS, here.database.read(dead_letters.count, MOST_DEAD_LETTERS)
        )
    except (Unavailable, TimeoutError):
        return None
