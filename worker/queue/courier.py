"""Publishes what a committed transition leaves to publish; the maintenance loop repeats it.

Called right after the commit by whoever made the transition. An outage is logged and otherwise
ignored: the job row and the outbox still say what must be published.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import redis
import structlog
from celery import Celery

from models import dispatch, outbox
from models.database import Database
from models.outbox import OutboxEntry, Postponed, refused, released
from models.outcomes import QueuedJob, Transition
from visq import points
from visq.consumer_queues import CONFIRM_SECONDS
from visq.errors import Unavailable
from visq.settings import Settings
from visq.streams import CANCEL_CHANNEL, EventWriter
from worker.queue.broker import Broker, Refused, places
from worker.queue.resting import Resting

log = structlog.get_logger(__name__)

GIVE_UP_AFTER: Final = 2
"""Events that met no server, one after the other: then there is none. One alone may have met a
connection that had died long before."""

AT_ONCE_SECONDS: Final = 2.0
"""Of a call that publishes events beside its work: after it, the rest is left to the maintenance
loop. Less than `models.outbox.GRACE_SECONDS`, in which that leaves them alone."""

OUTAGE_PAUSE: Final = 1.0
"""Seconds before an event that met no server is tried again."""


def connect_redis(settings: Settings) -> redis.Redis:
    """A pooled client with time-outs, for values and streams."""
    return redis.Redis.from_url(
        settings.redis, socket_timeout=10, socket_connect_timeout=3, health_check_interval=30
    )


class Courier:
    """Blocking and thread-safe."""

    def __init__(self, settings: Settings, database: Database, app: Celery | None = None) -> None:
        self._settings = settings
        self._database = database
        self.redis = connect_redis(settings)
        self.events = EventWriter(self.redis, ttl_seconds=settings.result_ttl_seconds)
        self.broker = Broker(settings, app)
        self._resting = Resting()

    def deliver(self, queued: Sequence[QueuedJob] = (), events: Sequence[OutboxEntry] = ()) -> None:
        """Publish queued jobs and result events, and note that it was done."""
        try:
            if queued:
                self.broker.publish_jobs(queued)
                points.reached("jobs.published")
                self._database.run(
                    dispatch.mark_published,
                    [job.id for job in queued],
                    republish_seconds=self._settings.republish_seconds,
                )
            if events:
                self.publish_events(events)
        except Unavailable as error:
            log.warning("left for the maintenance loop", error=str(error))

    def deliver_all(self, transitions: Sequence[Transition]) -> None:
        """`deliver` for several transitions at once."""
        self.deliver(
            [job for transition in transitions for job in transition.queued],
            [event for transition in transitions for event in transition.events],
        )

    def publish_events(
        self, entries: Sequence[OutboxEntry], *, seconds: float = AT_ONCE_SECONDS
    ) -> None:
        """Publish outbox entries to Redis and to the broker, and delete them. One that is refused
        stays for later, and those for the same place with it; the others are not held up.

        :param seconds: no event is begun after so long, and none waited for longer; those that were
            not tried are due again at once.
        :raises Unavailable: a server does not answer; what was not confirmed stays.
        """
        if not entries:
            return
        refusals = self._write_ends(entries)
        points.reached("events.in_redis")
        kept = [refusal for refusal in refusals if refusal is not None]
        taken = [entry for entry, no in zip(entries, refusals, strict=True) if no is None]
        published, postponed, outage = self._tell_broker(taken, seconds)
        points.reached("events.published")
        if published or postponed:
            self._database.run(outbox.settle, published, postponed)
        if outage is not None:
            raise outage
        if kept:
            raise Unavailable(f"Redis refuses results ({kept[0]})") from kept[0]

    def _tell_broker(
        self, entries: Sequence[OutboxEntry], seconds: float
    ) -> tuple[list[str], list[Postponed], Unavailable | None]:
        """Ids of the entries that were published, the other entries, and why the call ended early,
        if it was for want of a server."""
        deadline = time.monotonic() + seconds
        published: list[str] = []
        postponed: list[Postponed] = []
        outages: list[Unavailable] = []
        # Those for which it may wait in vain come last.
        left = deque(sorted(entries, key=lambda each: self._resting.suspects(places(each.payload))))
        while left and time.monotonic() < deadline:
            entry = left.popleft()
            where = places(entry.payload)
            rest = self._resting.seconds_left(where)
            if rest > 0:
                postponed.append(released(entry, rest))
                continue
            try:
                self.broker.publish_result(
                    entry.payload, confirm_seconds=min(seconds, CONFIRM_SECONDS)
                )
            except Refused as refusal:
                log.warning("a result is refused", place=refusal.place, error=str(refusal))
                self._resting.refused(refusal.place)
                postponed.append(refused(entry))
            except Unavailable as outage:
                postponed.append(released(entry, OUTAGE_PAUSE))
                outages.append(outage)
                if len(outages) == GIVE_UP_AFTER:
                    break
            else:
                outages.clear()
                self._resting.accepted(where)
                published.append(entry.id)
        postponed += map(released, left)
        return published, postponed, outages[-1] if outages else None

    def _write_ends(self, entries: Sequence[OutboxEntry]) -> list[redis.RedisError | None]:
        """Tell Redis of the jobs, in one round trip; what it refuses does not go to the broker
        either."""
        jobs = [entry for entry in entries if entry.kind == "result"]
        try:
            refused = self.events.end_all([entry.payload["data"] for entry in jobs])
            by_id = {entry.id: refusal for entry, refusal in zip(jobs, refused, strict=True)}
            return [by_id.get(entry.id) for entry in entries]
        except redis.RedisError as error:
            raise Unavailable(f"Redis does not answer ({type(error).__name__})") from error

    def nudge_cancel(self, job_ids: Sequence[str]) -> None:
        """Tell the workers at once that these running jobs were asked to stop.

        Without it they learn of it at their next heartbeat.
        """
        try:
            for job_id in job_ids:
                self.redis.publish(CANCEL_CHANNEL, job_id)
        except redis.RedisError as error:
            log.warning("cancel is left for the heartbeat", error=str(error))

    def ping(self) -> None:
        """:raises Unavailable: the broker does not answer."""
        self.broker.ping()

    def close(self) -> None:
        self.broker.close()
        self.redis.close()
