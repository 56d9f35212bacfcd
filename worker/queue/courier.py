"""Publishes what a committed transition leaves to publish; the maintenance loop repeats it.

Called right after the commit by whoever made the transition. An outage is logged and otherwise
ignored: the job row and the outbox still say what must be published.
"""

from __future__ import annotations

from collections.abc import Sequence

import redis
import structlog
from celery import Celery

from models import dispatch, outbox
from models.database import Database
from models.outbox import OutboxEntry
from models.outcomes import QueuedJob, Transition
from visq import points
from visq.errors import Unavailable
from visq.settings import Settings
from visq.streams import CANCEL_CHANNEL, EventWriter
from worker.queue.broker import Broker

log = structlog.get_logger(__name__)

GIVE_UP_AFTER = 2
"""Events refused one after the other: then it is not the event but the server."""


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

    def publish_events(self, entries: Sequence[OutboxEntry]) -> None:
        """Publish outbox entries to Redis and to the broker, and delete them. One that is refused
        stays, and does not hold up the others.

        :raises Unavailable: a server does not answer; what was not confirmed stays.
        """
        if not entries:
            return
        published: list[str] = []
        refusal: Unavailable | None = None
        refused_in_a_row = 0
        refusals = self._write_ends(entries)
        points.reached("events.in_redis")
        for entry, refused in zip(entries, refusals, strict=True):
            try:
                if refused is not None:
                    raise Unavailable(f"Redis refuses a result ({refused})") from refused
                self.broker.publish_result(entry.payload)
            except Unavailable as error:
                refusal = error
                refused_in_a_row += 1
                if refused_in_a_row == GIVE_UP_AFTER:
                    break
            else:
                refused_in_a_row = 0
                published.append(entry.id)
        points.reached("events.published")
        if published:
            self._database.run(outbox.done, published)
        if refusal is not None:
            raise refusal

    def _write_ends(self, entries: Sequence[OutboxEntry]) -> list[redis.RedisError | None]:
        """Tell Redis, in one round trip; what it refuses does not go to the broker either."""
        try:
            return self.events.end_all([entry.payload["data"] for entry in entries])
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
