"""What Redis holds besides the queue: result values, token streams, notes, and live workers.

======================== ========= ===========================================================
key                      type      content
======================== ========= ===========================================================
``visq:job:<id>``        string    the ended job as JSON (`visq.types.JobView`), with a TTL
``visq:events:<id>``     stream    ``attempt``, ``token`` and ``end`` entries, with a TTL
``visq:notify:<id>``     channel   a note that the stream has a new entry
``visq:cancel``          channel   ids of running jobs that were asked to stop
``visq:worker:<id>``     string    a live worker (`WorkerInfo`), with a TTL of some heartbeats
======================== ========= ===========================================================

A stream is a convenience, never the truth: after a loss of Redis, readers fall back to the job row.
An ``attempt`` entry says that what came before it belongs to an attempt that did not end the job.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal, cast

import redis
from pydantic import BaseModel

CANCEL_CHANNEL: Final = "visq:cancel"
WORKER_PREFIX: Final = "visq:worker:"
MAX_ENTRIES: Final = 20_000
"""Cap of one stream, so that a runaway answer cannot fill Redis."""


def job_key(job_id: str) -> str:
    return f"visq:job:{job_id}"


def events_key(job_id: str) -> str:
    return f"visq:events:{job_id}"


def notify_channel(job_id: str) -> str:
    return f"visq:notify:{job_id}"


class StreamEvent(BaseModel):
    """One entry of a token stream."""

    type: Literal["attempt", "token", "end"]
    attempt: int
    text: str = ""
    """``token``: the text to append."""
    job: dict[str, Any] | None = None
    """``end``: the job (`visq.types.JobView` as JSON)."""

    def fields(self) -> dict[str, str]:
        """The fields of the stream entry."""
        return {"event": self.model_dump_json(exclude_defaults=True)}

    @classmethod
    def from_fields(cls, fields: dict[bytes, bytes] | dict[str, str]) -> StreamEvent:
        raw = cast("dict[Any, Any]", fields)
        return cls.model_validate_json(raw[b"event"] if b"event" in raw else raw["event"])


class WorkerInfo(BaseModel):
    """A live worker, as it announces itself."""

    id: str
    model: str
    engine: str
    device: str
    dtype: str
    concurrency: int
    in_flight: int


class EventWriter:
    """Writes token streams and result values; used by workers and by whoever ends a job."""

    def __init__(self, client: redis.Redis, *, ttl_seconds: int) -> None:
        self._redis = client
        self._ttl = ttl_seconds

    def attempt(self, job_id: str, attempt: int) -> None:
        """A run begins: readers discard the tokens of earlier attempts."""
        self._add(job_id, StreamEvent(type="attempt", attempt=attempt))

    def token(self, job_id: str, attempt: int, text: str) -> None:
        self._add(job_id, StreamEvent(type="token", attempt=attempt, text=text))

    def end(self, job: dict[str, Any]) -> None:
        """Store the ended job as a value, and close its stream. Harmless when repeated."""
        event = StreamEvent(type="end", attempt=job["attempt"], job=job)
        self._redis.set(job_key(job["id"]), json.dumps(job), ex=self._ttl)
        self._add(job["id"], event)

    def _add(self, job_id: str, event: StreamEvent) -> None:
        key = events_key(job_id)
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.xadd(key, cast("Any", event.fields()), maxlen=MAX_ENTRIES, approximate=True)
            pipe.expire(key, self._ttl)
            pipe.publish(notify_channel(job_id), event.type)
            pipe.execute()
