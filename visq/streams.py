"""What Redis holds besides the queue: result values, token streams, notes, and workers.

============================= ========= ============================================================
key                           type      content
============================= ========= ============================================================
``visq:job:<id>``             string    the ended job as JSON (`visq.types.JobView`), with a TTL
``visq:events:<id>``          stream    ``attempt``, ``token`` and ``end`` entries, with a TTL
``visq:notify:<id>``          channel   a note that the stream has a new entry
``visq:cancel``               channel   ids of running jobs that were asked to stop
``visq:worker:<id>``          string    a live worker (`WorkerInfo`), with a TTL of some heartbeats
``visq:workers``              set       ids of workers, of dead ones too until somebody looks
``visq:failed-worker:<name>`` string    why a worker did not start (`WorkerFailure`), with a TTL
``visq:pace``                 string    how batches give way to chat (`worker.queue.pace`)
``visq:failed-workers``       set       names of those, with the TTL of the last one
============================= ========= ============================================================

A stream is a convenience, never the truth: after a loss of Redis, readers fall back to the job row.
An ``attempt`` entry says that what came before it belongs to an attempt that did not end the job.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal, cast

import redis
from pydantic import BaseModel

CANCEL_CHANNEL: Final = "visq:cancel"
WORKERS_KEY: Final = "visq:workers"
FAILED_WORKERS_KEY: Final = "visq:failed-workers"
FAILURE_SECONDS: Final = 900
"""How long the failure of a worker's start is known: longer than the pauses that a supervisor makes
between two starts (Kubernetes: up to 5 minutes), and the loading of a large model."""
LONGEST_REASON: Final = 1000
"""Characters of it; a library may give a whole listing of a checkpoint."""
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

    def as_json(self) -> str:
        """The value of the field ``event`` of the stream's entry."""
        return self.model_dump_json(exclude_defaults=True)

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
    engine_down: str | None = None
    """Why its engine does not answer just now: it claims no job until that is up again."""
    started_at: datetime | None = None
    """When its model was loaded, by the clock of its machine; ``None``: an older version's."""


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


class WorkerFailure(BaseModel):
    """A worker that could not load its model, as it announces itself before it ends."""

    host: str
    model: str
    reason: str
    at: datetime
    """By the clock of its machine."""

    @property
    def name(self) -> str:
        """The next start on the same host with the same model replaces it."""
        return f"{self.host}:{self.model}"


def failed_worker_key(name: str) -> str:
    return f"visq:failed-worker:{name}"


def announce_failure(client: redis.Redis, host: str, model: str, reason: str) -> None:
    """Say that a worker of `host` could not load `model`, for the next `FAILURE_SECONDS`."""
    if len(reason) > LONGEST_REASON:
        reason = reason[:LONGEST_REASON] + " ..."
    failure = WorkerFailure(host=host, model=model, reason=reason, at=datetime.now(UTC))
    with client.pipeline() as pipe:
        pipe.set(failed_worker_key(failure.name), failure.model_dump_json(), ex=FAILURE_SECONDS)
        pipe.sadd(FAILED_WORKERS_KEY, failure.name)
        pipe.expire(FAILED_WORKERS_KEY, FAILURE_SECONDS)
        pipe.execute()


def withdraw_failures(client: redis.Redis, host: str) -> None:
    """A worker of `host` is up: what was announced of earlier starts there is outdated. If another
    worker of that host still cannot start, its next start says so again."""
    names = [cast("bytes", name).decode() for name in client.smembers(FAILED_WORKERS_KEY)]
    if ours := [name for name in names if name.startswith(f"{host}:")]:
        client.delete(*map(failed_worker_key, ours))
        client.srem(FAILED_WORKERS_KEY, *ours)


def failed_workers(client: redis.Redis) -> list[WorkerFailure]:
    """Workers that could not start lately, by name."""
    names = [cast("bytes", name).decode() for name in client.smembers(FAILED_WORKERS_KEY)]
    # Outdated names stay: the same one may be announced again just now.
    values = client.mget(map(failed_worker_key, sorted(names))) if names else []
    return [WorkerFailure.model_validate_json(value) for value in values if value is not None]


@dataclass(frozen=True, slots=True)
class StreamWrite:
    """An entry to add to a job's stream."""

    job_id: str
    event: StreamEvent
    lasting: bool = True
    """Let the stream live for a whole TTL from now on. It costs a command: not with every token."""


_ADD: Final = """
local refusals = {}
for i = 1, #KEYS do
  local at = 4 * i - 1
  local added = redis.pcall('XADD', KEYS[i], 'MAXLEN', '~', ARGV[1], '*', 'event', ARGV[at])
  if type(added) == 'table' and added.err then
    refusals[#refusals + 1] = {i, added.err}
  else
    if ARGV[at + 1] == '1' then redis.call('EXPIRE', KEYS[i], ARGV[2]) end
    redis.call('PUBLISH', ARGV[at + 2], ARGV[at + 3])
  end
end
return refusals
"""
"""Adds many entries by one command, since what a client spends on one is a third of what it spends
on two commands for each. Keys are streams; arguments: cap, TTL, and four for each entry (event,
whether it is lasting, channel, note)."""


_END: Final = """
local function at(text)
  local ok, job = pcall(cjson.decode, text)
  local finished = ok and type(job) == 'table' and job.finished_at
  if type(finished) ~= 'string' then return '' end
  finished = string.gsub(finished, 'Z$', '')
  return string.find(finished, '.', 1, true) and finished or finished .. '.'
end
local refusals = {}
for i = 1, #KEYS / 2 do
  local value, stream, first = KEYS[2 * i - 1], KEYS[2 * i], 4 * i - 1
  local stored = redis.pcall('GET', value)
  local newer = type(stored) == 'string' and at(stored) > at(ARGV[first])
  if not newer then
    local set = redis.pcall('SET', value, ARGV[first], 'EX', ARGV[2])
    local added = redis.pcall('XADD', stream, 'MAXLEN', '~', ARGV[1], '*', 'event', ARGV[first + 1])
    local err = set.err or (type(added) == 'table' and added.err)
    if err then
      refusals[#refusals + 1] = {i, err}
    else
      redis.call('EXPIRE', stream, ARGV[2])
      redis.call('PUBLISH', ARGV[first + 2], ARGV[first + 3])
    end
  end
end
return refusals
"""
"""Stores ended jobs and closes their streams. A job that was retried ends more than once, and the
event of its earlier end may come late: it must not replace that of the later one. Keys are a value
and a stream for each; arguments: cap, TTL, and four for each job (the job, event, channel, note).

Times are compared as text, as pydantic writes them: UTC, and a fraction only if there is one."""


class EventWriter:
    """Writes token streams and result values; used by workers and by whoever ends a job.

    What is written together takes one round trip, and a fraction of the time.
    """

    def __init__(self, client: redis.Redis, *, ttl_seconds: int) -> None:
        self._redis = client
        self._add = client.register_script(_ADD)
        self._end = client.register_script(_END)
        self.ttl_seconds = ttl_seconds

    def write(self, writes: Sequence[StreamWrite]) -> list[redis.RedisError | None]:
        """Add the entries, in order; what became of each of them.

        :raises redis.RedisError: the server does not answer; what was written is unknown.
        """
        if not writes:
            return []
        keys = [events_key(each.job_id) for each in writes]
        arguments: list[str | int] = [MAX_ENTRIES, self.ttl_seconds]
        for each in writes:
            arguments += [
                each.event.as_json(),
                int(each.lasting),
                notify_channel(each.job_id),
                each.event.type,
            ]
        return _outcomes(self._add(keys, arguments), len(writes))

    def attempt(self, job_id: str, attempt: int) -> None:
        """A run begins: readers discard the tokens of earlier attempts."""
        self._write_one(job_id, StreamEvent(type="attempt", attempt=attempt))

    def token(self, job_id: str, attempt: int, text: str, index: int = 0) -> None:
        """New text of choice `index`."""
        self._write_one(job_id, StreamEvent(type="token", attempt=attempt, text=text, index=index))

    def end(self, job: dict[str, Any]) -> None:
        """Store the ended job as a value, and close its stream. Harmless when repeated.

        :raises redis.RedisError: it was not, or not wholly, written.
        """
        [error] = self.end_all([job])
        if error is not None:
            raise error

    def end_all(self, jobs: Sequence[dict[str, Any]]) -> list[redis.RedisError | None]:
        """`end` for many jobs; what became of each of them.

        :raises redis.RedisError: the server does not answer.
        """
        if not jobs:
            return []
        keys: list[str] = []
        arguments: list[str | int] = [MAX_ENTRIES, self.ttl_seconds]
        for job in jobs:
            event = StreamEvent(type="end", attempt=job["attempt"], job=job)
            keys += [job_key(job["id"]), events_key(job["id"])]
            arguments += [json.dumps(job), event.as_json(), notify_channel(job["id"]), event.type]
        return _outcomes(self._end(keys, arguments), len(jobs))

    def _write_one(self, job_id: str, event: StreamEvent) -> None:
        [error] = self.write([StreamWrite(job_id, event)])
        if error is not None:
            raise error


def _outcomes(refusals: Any, count: int) -> list[redis.RedisError | None]:
    """What a script says it could not write, by its number (from 1), for each of `count`."""
    refused = {number: redis.ResponseError(said.decode()) for number, said in refusals}
    return [refused.get(number) for number in range(1, count + 1)]
