"""What Redis holds besides the queue: result values, token streams, notes, and live workers.

======================== ========= ===========================================================
key                      type      content
======================== ========= ===========================================================
``visq:job:<id>``        string    the ended job as JSON (`visq.types.JobView`), with a TTL
``visq:events:<id>``     stream    ``attempt``, ``token`` and ``end`` entries, with a TTL
``visq:notify:<id>``     channel   a note that the stream has a new entry
``visq:cancel``          channel   ids of running jobs that were asked to stop
``visq:worker:<id>``     string    a live worker (`WorkerInfo`), with a TTL of some heartbeats
``visq:workers``         set       ids of workers, of dead ones too until somebody looks
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
WORKERS_KEY: Final = "visq:workers"
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
    index: int = 0
    """``token``: which of the ``n`` choices says it."""
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


def worker_key(worker_id: str) -> str:
    return f"visq:worker:{worker_id}"


def announce_worker(client: redis.Redis, info: WorkerInfo, *, ttl_seconds: int) -> None:
    """Say that a worker lives, for the next `ttl_seconds`."""
    with client.pipeline() as pipe:
        pipe.set(worker_key(info.id), info.model_dump_json(), ex=ttl_seconds)
        pipe.sadd(WORKERS_KEY, info.id)
        pipe.execute()


def withdraw_worker(client: redis.Redis, worker_id: str) -> None:
    """Say that a worker has ended."""
    client.delete(worker_key(worker_id))
    client.srem(WORKERS_KEY, worker_id)


def live_workers(client: redis.Redis) -> list[WorkerInfo]:
    """The workers that live; forgets the dead ones on the way."""
    ids = [cast("bytes", id_).decode() for id_ in client.smembers(WORKERS_KEY)]
    values = client.mget([worker_key(id_) for id_ in ids]) if ids else []
    dead = [id_ for id_, value in zip(ids, values, strict=True) if value is None]
    if dead:
        client.srem(WORKERS_KEY, *dead)
    return [WorkerInfo.model_validate_json(value) for value in values if value is not None]


class EventWriter:
    """Writes token streams and result values; used by workers and by whoever ends a job."""

    def __init__(self, client: redis.Redis, *, ttl_seconds: int) -> None:
        self._redis = client
        self._ttl = ttl_seconds

    def attempt(self, job_id: str, attempt: int) -> None:
        """A run begins: readers discard the tokens of earlier attempts."""
        self._add(job_id, StreamEvent(type="attempt", attempt=attempt))

    def token(self, job_id: str, attempt: int, text: str, index: int = 0) -> None:
        """New text of choice `index`."""
        self._add(job_id, StreamEvent(type="token", attempt=attempt, text=text, index=index))

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
