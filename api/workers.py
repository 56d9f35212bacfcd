"""The live workers, as they announce themselves in Redis."""

from __future__ import annotations

import time
from typing import Final, cast

import redis.asyncio
from redis.exceptions import RedisError

from visq.errors import Unavailable
from visq.streams import WORKERS_KEY, WorkerInfo, worker_key

FRESH_SECONDS: Final = 2.0
"""How long a look at Redis is good."""


class Workers:
    """Looks no more often than every `FRESH_SECONDS`."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis = client
        self._seen: list[WorkerInfo] = []
        self._seen_at = -FRESH_SECONDS

    async def alive(self) -> list[WorkerInfo]:
        """:raises Unavailable: Redis does not answer."""
        if time.monotonic() - self._seen_at >= FRESH_SECONDS:
            try:
                self._seen = await self._look()
            except (RedisError, OSError) as error:
                raise Unavailable("Redis does not answer; try again") from error
            self._seen_at = time.monotonic()
        return self._seen

    async def any_alive(self) -> bool:
        """Whether a worker is alive; yes, if nobody can know."""
        try:
            return bool(await self.alive())
        except Unavailable:
            return True

    async def _look(self) -> list[WorkerInfo]:
        ids = await self._redis.smembers(WORKERS_KEY)
        keys = [worker_key(id_.decode()) for id_ in cast("set[bytes]", ids)]
        values = await self._redis.mget(keys) if keys else []
        return [WorkerInfo.model_validate_json(value) for value in values if value is not None]
