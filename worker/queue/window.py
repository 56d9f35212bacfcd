"""How many items of batches may be at the workers at a time, and whose turn counts for more."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import redis
import structlog

from models import latest, reading
from models.database import Database
from visq.settings import Settings
from visq.streams import WorkerInfo, live_workers
from worker.queue import pace

log = structlog.get_logger(__name__)

FRESH_SECONDS: Final = 2.0
"""How long a look at the workers is good."""

KEPT_FREE: Final = 1 / 8
"""Of what the workers hold: for jobs of other lanes, which so find room at once. Engines hold more
than they run at a time (`EngineInfo.capacity`), so that none stands idle for it."""

WITHOUT_WORKERS: Final = 64
"""Items that wait in the broker for the first worker to come."""


class Window:
    """What `models.batch_windows.fill_windows` is asked for."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        client: redis.Redis,
        look: Callable[[redis.Redis], list[WorkerInfo]] = live_workers,
    ) -> None:
        self._settings = settings
        self._database = database
        self._redis = client
        self._look = look
        self._most = WITHOUT_WORKERS
        self._share = 1.0
        self._looked_at = self._paced_at = -FRESH_SECONDS
        self._weights: dict[str, float] = {}

    def most(self) -> int:
        """Items in flight at most."""
        if self._settings.batch_window:
            return self._settings.batch_window
        now = time.monotonic()
        try:
            if now - self._looked_at >= FRESH_SECONDS:
                self._looked_at = now
                self._most = room_of(self._look(self._redis))
            if now - self._paced_at >= pace.LOOK_SECONDS:
                self._paced_at = now
                self._share = self._pace().share
        except (redis.RedisError, OSError) as error:
            log.debug("the window stays as it was", error=str(error))
        return max(1, round(self._most * self._share))

    def _pace(self) -> pace.Pace:
        found = pace.read(self._redis)
        if pace.is_ones_turn(self._redis):
            waits = self._database.read(latest.chat_waits, pace.WAITS_OF_SECONDS)
            found = found.after(waits, pace.this_minute())
            pace.write(self._redis, found)
        return found

    def weights(self) -> dict[str, float]:
        """By the ids of tenants."""
        named = self._settings.weights
        if len(self._weights) < len(named):  # a tenant is made when its key is first seen
            ids = self._database.read(reading.tenant_ids, list(named))
            self._weights = {id_: named[name] for name, id_ in ids.items()}
        return self._weights


def room_of(workers: list[WorkerInfo]) -> int:
    """Items that these workers may have at a time, together."""
    held = sum(worker.concurrency for worker in workers)
    return max(held - max(len(workers), round(held * KEPT_FREE)), 1) if held else WITHOUT_WORKERS
