"""The live workers, and those that could not start, as they announce themselves in Redis."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final, cast

import redis.asyncio
from redis.exceptions import RedisError

from visq.errors import Unavailable
from visq.streams import (
    FAILED_WORKERS_KEY,
    WORKERS_KEY,
    WorkerFailure,
    WorkerInfo,
    failed_worker_key,
    worker_key,
)

FRESH_SECONDS: Final = 2.0
"""How long a look at Redis is good."""


@dataclass(frozen=True)
class Seen:
    """What one look at Redis found."""

    alive: list[WorkerInfo] = field(default_factory=list)
    failed: list[WorkerFailure] = field(default_factory=list)


class Workers:
    """Looks no more often than every `FRESH_SECONDS`."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis = client
        self._seen = Seen()
        self._seen_at = -FRESH_SECONDS

    async def look(self) -> Seen:
        """:raises Unavailable: Redis does not answer."""
        if time.monotonic() - self._seen_at >= FRESH_SECONDS:
            try:
                self._seen = await self._look()
            except (RedisError, OSError) as error:
                raise Unavailable("Redis does not answer; try again") from error
            self._seen_at = time.monotonic()
        return self._seen

    async def alive(self) -> list[WorkerInfo]:
        """:raises Unavailable: Redis does not answer."""
        return (await self.look()).alive

    async def models(self) -> set[str] | None:
        """What is served now; ``None``: nobody can know."""
        try:
            return {worker.model for worker in await self.alive()}
        except Unavailable:
            return None

    async def any_alive(self) -> bool:
        """Whether a worker is alive; yes, if nobody can know."""
        try:
            return bool(await self.alive())
        except Unavailable:
            return True

    async def _look(self) -> Seen:
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.smembers(WORKERS_KEY)
            pipe.smembers(FAILED_WORKERS_KEY)
            ids, names = cast("list[set[bytes]]", await pipe.execute())
        alive = [worker_key(id_.decode()) for id_ in ids]
        failed = [failed_worker_key(name.decode()) for name in sorted(names)]
        values = await self._redis.mget([*alive, *failed]) if alive or failed else []
        return Seen(
            [WorkerInfo.model_validate_json(v) for v in values[: len(alive)] if v is not None],
            [WorkerFailure.model_validate_json(v) for v in values[len(alive) :] if v is not None],
        )
