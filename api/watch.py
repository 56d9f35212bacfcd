"""Waiting for jobs: one Redis subscription connection for all waiters of this process.

A note in ``visq:notify:<job>`` wakes the waiters of that job. Notes can be lost and Redis can be
away, so a look at the database every second, one query for all waiters, finds the jobs that have
ended. Who is woken looks for himself: a note is a hint, never the truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import redis.asyncio
import structlog
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError
from sqlalchemy import select
from sqlalchemy.orm import Session

from models import jobs
from models.database import AsyncDatabase, TenantDatabase
from models.tables import Job
from visq.errors import Unavailable
from visq.streams import CANCEL_CHANNEL, notify_channel
from visq.types import TERMINAL

log = structlog.get_logger(__name__)

LOOK_SECONDS: Final = 1.0
"""Time between two looks at the database."""
RECONNECT_SECONDS: Final = 0.5
CHUNK: Final = 1000
"""Jobs in one query."""


class Watcher:
    """One waiter for one job."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        """The job's stream has new entries, or the job has ended, or the process stops."""
        self.ended = asyncio.Event()
        """The job seems to have ended, or the process stops."""

    def wake(self, *, ended: bool) -> None:
        self.changed.set()
        if ended:
            self.ended.set()


class Watch:
    """All waiters of this process."""

    def __init__(self, client: redis.asyncio.Redis, database: AsyncDatabase) -> None:
        self._redis = client
        self._database = database
        self._watchers: dict[str, set[Watcher]] = {}
        self._pubsub: PubSub | None = None
        self._commands: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.stopping = False
        """No answer is worth waiting for any more: the process is about to stop."""

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._look())]

    def release(self) -> None:
        """Let all waiters go: long polls answer with what is, streams end (and can be resumed)."""
        self.stopping = True
        self._wake(self._watchers, ended=True)

    async def stop(self) -> None:
        self.release()
        for task in [*self._tasks, *self._commands]:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    @contextmanager
    def watching(self, job_id: str) -> Iterator[Watcher]:
        """Watch a job. Look at it after this has begun, or its end may be missed."""
        watcher = Watcher()
        watchers = self._watchers.setdefault(job_id, set())
        if not watchers:
            self._command("subscribe", job_id)
        watchers.add(watcher)
        try:
            yield watcher
        finally:
            watchers.discard(watcher)
            if not watchers:
                self._watchers.pop(job_id, None)
                self._command("unsubscribe", job_id)

    async def until_ended(self, database: TenantDatabase, job_id: str, seconds: float) -> Job:
        """The job, when it has ended, or as it is after `seconds`.

        :raises NotFound: no such job.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        job = await database.read(jobs.get, job_id)
        if job.status.is_terminal or not seconds:
            return job
        with self.watching(job_id) as watcher:
            while True:
                watcher.ended.clear()
                job = await database.read(jobs.get, job_id)
                left = deadline - loop.time()
                if job.status.is_terminal or left <= 0 or self.stopping:
                    return job
                with suppress(TimeoutError):
                    await asyncio.wait_for(watcher.ended.wait(), left)

    def _wake(self, job_ids: Sequence[str] | dict[str, set[Watcher]], *, ended: bool) -> None:
        for job_id in list(job_ids):
            for watcher in self._watchers.get(job_id, ()):
                watcher.wake(ended=ended)

    def _command(self, name: str, job_id: str) -> None:
        """Tell Redis in the background; if it is away, `_listen` subscribes when it is back."""
        if self._pubsub is not None:
            task = asyncio.create_task(self._tell(self._pubsub, name, job_id))
            self._commands.add(task)
            task.add_done_callback(self._commands.discard)

    async def _tell(self, pubsub: PubSub, name: str, job_id: str) -> None:
        # By now the other command may have become the right one: the later look decides.
        if (name == "subscribe") != (job_id in self._watchers):
            return
        with suppress(RedisError, OSError):
            await getattr(pubsub, name)(notify_channel(job_id))

    async def _listen(self) -> None:
        """Turn notes into wake-ups, over whatever becomes of Redis."""
        prefix = len(notify_channel(""))
        away = False
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                    # A channel that is always there: `listen` ends without subscriptions.
                    await pubsub.subscribe(CANCEL_CHANNEL)
                    self._pubsub = pubsub
                    watched = list(self._watchers)
                    if watched:
                        await pubsub.subscribe(*map(notify_channel, watched))
                    self._wake(watched, ended=True)  # notes of the time between are lost
                    away = False
                    async for note in pubsub.listen():
                        job_id = note["channel"].decode()[prefix:]
                        self._wake([job_id], ended=note["data"] == b"end")
            except (RedisError, OSError) as error:
                if not away:
                    log.warning("no notes from Redis, only looks at the database", error=str(error))
                away = True
            except Exception:
                # A bug must not end the notes of all later requests.
                log.exception("listening to Redis failed")
            finally:
                self._pubsub = None
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _look(self) -> None:
        """Find watched jobs that have ended, whatever becomes of Redis."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            watched = list(self._watchers)
            try:
                for start in range(0, len(watched), CHUNK):
                    chunk = watched[start : start + CHUNK]
                    self._wake(await self._database.read(_ended, chunk), ended=True)
            except Unavailable as error:
                log.warning("the database does not answer", error=str(error))
            except Exception:
                log.exception("looking for ended jobs failed")


def _ended(session: Session, job_ids: Sequence[str]) -> Sequence[str]:
    return session.scalars(
        select(Job.id).where(Job.id.in_(job_ids), Job.status.in_(TERMINAL))
    ).all()
