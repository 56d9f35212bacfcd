"""A job's events as Server-Sent Events: tokens as they come, then its end.

======== ==================================== =====================================================
event    data                                 meaning
======== ==================================== =====================================================
attempt  ``{"attempt": 2}``                   a run begins: discard all text so far
token    ``{"attempt": 2, "text": "..."}``    append the text
end      the job (`visq.types.JobView`)       it has ended; nothing follows
======== ==================================== =====================================================

With ``n`` > 1 the choices come mixed: a ``token`` of any but the first has its ``index`` as well.

The ids are those of the Redis stream, so a reader resumes by ``Last-Event-ID`` at any API process.
The job row is the truth: when Redis has lost the stream, the end comes from the row, with the whole
text after a new ``attempt``, so that whoever appends tokens still has the right text.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import redis.asyncio
import structlog
from redis.exceptions import RedisError
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.watch import Watch
from models import jobs
from models.database import TenantDatabase
from models.tables import Job
from models.views import job_view
from visq.errors import Unavailable
from visq.streams import StreamEvent, events_key
from visq.types import JobView

log = structlog.get_logger(__name__)

KEEP_ALIVE_SECONDS: Final = 15.0
"""Longest silence: proxies cut connections, and a client that left is noticed by writing."""
PAGE: Final = 500
"""Entries read from Redis at a time."""
KEEP_ALIVE: Final = ": keep-alive\n\n"
FROM_THE_ROW: Final = "end"
"""Id of an end that did not come from the stream."""

EVENT_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "event": {"enum": ["attempt", "token", "end"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["id", "event", "data"],
}
"""One event, for the OpenAPI."""

_STREAM_ID = re.compile(r"\d{1,19}-\d{1,19}")


@dataclass(frozen=True)
class Entry:
    """An entry of the stream with its id."""

    id: str
    event: StreamEvent


@dataclass(frozen=True)
class Said:
    """What a reader is told: an attempt or a token, the end with its job, or only that the
    connection lives."""

    id: str | None = None
    """``None``: not from the stream, but from the row."""
    event: StreamEvent | None = None
    job: JobView | None = None
    """Of the end."""

    def as_text(self) -> str:
        """As a Server-Sent Event."""
        if self.job is not None:
            return shown("end", self.job.model_dump_json(), self.id or FROM_THE_ROW)
        if self.event is None:
            return KEEP_ALIVE
        said = self.event
        data = {"attempt": said.attempt} if said.type == "attempt" else _token(said)
        return shown(said.type, json.dumps(data), self.id)


class EventStream(StreamingResponse):
    """Sends events; frees what they hold as soon as the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(
            _until_an_outage(events),
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _until_an_outage(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The answer has begun, so no status can tell of an outage any more: it ends without an `end`.
    A reader that asks again, after the last event that it has, gets the status."""
    try:
        async for text in events:
            yield text
    except Unavailable as error:
        log.warning("a token stream ends early", error=str(error))


class JobEvents:
    """The events of one job, for one reader."""

    def __init__(
        self, client: redis.asyncio.Redis, watch: Watch, database: TenantDatabase, job_id: str
    ) -> None:
        self._redis = client
        self._watch = watch
        self._database = database
        self._job_id = job_id

    async def has_seen_the_end(self, job: Job, last_event_id: str) -> bool:
        """Whether a reader that was told `last_event_id` knows the end of `job`."""
        if not job.status.is_terminal:
            return False
        if last_event_id == FROM_THE_ROW:
            return True
        if not _STREAM_ID.fullmatch(last_event_id):
            return False
        entries = await self._read(last_event_id, last_event_id)
        return bool(entries) and _is_end_of(entries[0].event, job)

    async def after(self, last_event_id: str | None) -> AsyncGenerator[str, None]:
        """The events as text, after an id that an earlier answer gave, or from the start."""
        async with aclosing(self.follow(last_event_id)) as events:
            async for said in events:
                yield said.as_text()

    async def follow(self, last_event_id: str | None) -> AsyncGenerator[Said, None]:
        """What happens to the job, until its end (the last one) or that of this process.

        :raises Unavailable: the database does not answer.
        """
        start = "-"
        if last_event_id is not None and _STREAM_ID.fullmatch(last_event_id):
            start = f"({last_event_id}"
        ended: Job | None = None
        attempt = 0
        with self._watch.watching(self._job_id) as watcher:
            watcher.wake(ended=True)  # it may have ended long ago
            while not self._watch.stopping:
                watcher.changed.clear()
                if watcher.ended.is_set():
                    watcher.ended.clear()
                    ended = await self._row_if_ended()
                # The stream after the row: what an ended job's stream has not, it has lost.
                entries = await self._read(start)
                if entries and ended and start == "-" and entries[0].event.type == "token":
                    entries = []  # its beginning was cut off; the row has the whole text
                for entry in entries:
                    start = f"({entry.id}"
                    if entry.event.type != "end":
                        # A run that has lost its job speaks on until it knows.
                        if entry.event.attempt >= attempt:
                            attempt = entry.event.attempt
                            yield Said(entry.id, entry.event)
                        continue
                    job = await self._row_if_ended()
                    if job is not None and _is_end_of(entry.event, job):
                        yield Said(entry.id, job=job_view(job))
                        return
                if entries:
                    continue
                if ended is not None:
                    for said in _from_the_row(job_view(ended)):
                        yield said
                    return
                try:
                    await asyncio.wait_for(watcher.changed.wait(), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    yield Said()

    async def _row_if_ended(self) -> Job | None:
        job = await self._database.read(jobs.get, self._job_id)
        return job if job.status.is_terminal else None

    async def _read(self, start: str, end: str = "+") -> list[Entry]:
        """A page of the stream; nothing if Redis is away, as then the row will tell the end."""
        try:
            raw: Any = await self._redis.xrange(events_key(self._job_id), start, end, count=PAGE)
        except (RedisError, OSError) as error:
            log.warning("a token stream cannot be read", job=self._job_id, error=str(error))
            return []
        return [Entry(id_.decode(), StreamEvent.from_fields(fields)) for id_, fields in raw]


def _is_end_of(event: StreamEvent, job: Job) -> bool:
    """Whether an ``end`` entry is of this end: a job that was retried has ended before."""
    return event.type == "end" and (
        JobView.model_validate(event.job).finished_at == job.finished_at
    )


def _token(said: StreamEvent) -> dict[str, Any]:
    # Without the index for the only choice or the first one: so it was before there were others.
    index = {"index": said.index} if said.index else {}
    return {"attempt": said.attempt, "text": said.text, **index}


def _from_the_row(job: JobView) -> list[Said]:
    """The events of an ended job without its stream."""
    events = []
    if job.result is not None:
        events.append(StreamEvent(type="attempt", attempt=job.attempt))
        for index, choice in enumerate(job.result.choices or [job.result]):
            events.append(
                StreamEvent(type="token", attempt=job.attempt, text=choice.text, index=index)
            )
    return [*(Said(event=event) for event in events), Said(job=job)]


def shown(event: str, data: str, id_: str | None = None) -> str:
    """One event on the wire; `data` is JSON, and so one line."""
    head = "" if id_ is None else f"id: {id_}\n"
    return f"{head}event: {event}\ndata: {data}\n\n"
